#!/bin/sh
# What Envoy's container runs: Envoy, on the configuration that the processor has rendered.
#
#   PORT                   where callers come in
#   TOLLGATE_ENVOY_CONFIG  the rendered configuration; what is made of it is put beside it
#   ENVOY_ADMIN_PORT, ENVOY_CONCURRENCY, ENVOY_DRAIN_S   see Dockerfile.envoy
set -eu
config="${TOLLGATE_ENVOY_CONFIG%.yaml}-$PORT.yaml"
sed -e "s/port_value: PORT\$/port_value: $PORT/" -e "s/port_value: ADMIN_PORT\$/port_value: $ENVOY_ADMIN_PORT/" \
    "$TOLLGATE_ENVOY_CONFIG" >"$config"

# On SIGTERM Envoy would end at once, and every stream with it: it gets it once the processor has drained them.
draining=
drain() {
    trap '' TERM INT
    draining=yes
    sleep "$ENVOY_DRAIN_S"
    kill -TERM "$envoy"
}

envoy --config-path "$config" --concurrency "$ENVOY_CONCURRENCY" --log-level warn --file-flush-interval-msec 500 \
    --disable-hot-restart &
envoy=$!
trap drain TERM INT

status=0
wait "$envoy" || status=$?
if [ -n "$draining" ] && kill -0 "$envoy" 2>/dev/null; then # it was the signal that ended the wait
    status=0
    wait "$envoy" || status=$?
fi
exit "$status"
