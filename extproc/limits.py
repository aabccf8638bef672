"""Every bound, with its reason. What is not named here is not bounded, and that is a defect."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# Requests -------------------------------------------------------------------------------------------------------------
MAX_REQUEST_BYTES = 32 * MIB  # what Cloud Run itself accepts over HTTP/1; Envoy's buffer limit is the same figure
MAX_JSON_DEPTH = 64  # deeper than any tool schema seen in the recorded requests (17), shallow enough to recurse over
MAX_INTEGER_DIGITS = 20  # CPython's own integer parsing is quadratic; no field of the API needs more than 64 bits
MAX_JSON_STRUCTURE_BYTES = (
    512 * KIB
)  # all but text and white space: 30 bytes for each message; 50 ms of parsing at most
MAX_ERROR_FIELD_CHARS = 200  # of a caller's own names, as an error repeats them
MAX_CHOICES = 128  # OpenAI's own bound on `n`
MAX_MESSAGES = 16_384
MAX_INPUTS = 2_048  # OpenAI's own bound on an array of texts to embed
MAX_INPUT_TOKENS = 2**20  # of a text given as token ids: the largest context that is sold
MAX_MODEL_NAME_CHARS = 256
MAX_TOOL_CALLS = 1_000  # of a provider's own tools, as a caller may bound them
DEFAULT_TOOL_CALLS = 32  # where it does not: each may be a search at a price of its own
MAX_TOKEN_BYTES = 16 * KIB  # an ID token is 1–2 KB; Envoy's own header limit is 60 KB
MAX_USER_CHARS = 320  # the longest e-mail address (RFC 3696, errata 1690)
TOKEN_SKEW_S = 10  # how far the issuer's clock and ours may differ
MAX_TOKEN_LIFETIME_S = 24 * 3600  # Google's tokens live for an hour; its own libraries accept a day

# Responses ------------------------------------------------------------------------------------------------------------
MAX_EVENT_BYTES = 8 * MIB  # one SSE event: an image in base64 fits, a stream without line ends does not
MAX_ANSWER_BYTES = 32 * MIB  # a whole JSON answer, kept to read its usage
MAX_ERROR_BYTES = 1 * MIB  # a provider's error body, kept to take secrets out

CUT_FLUSH_MS = 20  # between the error event and the reset: an HTTP/2 client drops data that arrives with the reset
ABANDONED_TOKENS_PER_S = 200  # faster than models write: bounds what was generated unseen before a caller left
FIRST_EVENT_WAIT_MS = 600_000  # envoy.yaml's max_message_timeout; its per_try_timeout decides long before

# Counting -------------------------------------------------------------------------------------------------------------
INLINE_COUNT_CHARS = 4_000  # about 0.5 ms of tiktoken; a longer prompt is counted in a thread
CACHED_COUNT_CHARS = 24  # of a text whose count is remembered: a stream's events are a word each, or a few
MAX_CACHED_COUNTS = 8_192  # of such texts, for each encoding: 1 MB
COUNT_SLICE_CHARS = 4_096  # the longest text tiktoken is given at once: its regex and merges are super-linear
MAX_COUNT_CHARS = 512 * KIB  # of one prompt; more is estimated from as much: 0.1 s of tiktoken, 0.3 at worst
COUNT_THREADS = 2  # tiktoken works without the interpreter's lock
MAX_COUNT_QUEUE_CHARS = 64 * MAX_COUNT_CHARS  # of prompts being counted or waiting: 3 s of the threads, 10 at worst
MAX_EVENT_COUNT_CHARS = 64 * KIB  # of one event of a stream, likewise: 10 ms, 40 at worst, in the event loop
MAX_COUNTED_CHARS = 128 * KIB  # of an answer without usage: 15 ms of tiktoken, 130 where the text is no language
MIN_FACTOR, MAX_FACTOR = 0.25, 4.0  # a learned factor outside this is a bug or an attack
LEARN_MIN_TOKENS = 30  # shorter answers say little about a factor

# The ledger -----------------------------------------------------------------------------------------------------------
MAX_NANOUSD = 9_000_000 * 10**9  # 9 million USD: Lua's numbers are doubles, exact below 2^53
MAX_TOKENS = 2**53 - 1
MAX_BUDGETS_PER_REQUEST = 16
MAX_PIPELINE = 512  # commands in one pipeline; more wait for the next
MAX_LEDGER_QUEUE = 20_000  # commands waiting for Redis; above it a hold fails at once, so that nothing piles up
SETTLED_RETENTION_S = 6 * 3600  # how long a settled id is remembered, so that a repeat changes nothing
WINDOW_RETENTION_S = 3 * 24 * 3600  # how long a closed window's balance is kept, for late settlements and reports
SWEEP_BATCH = 100  # expired holds posted by one run of the sweep
MAX_OUTBOX_ROWS = 50_000  # of one instance that no usage store has, 40 MB of Redis; more are on its own disk only
MAX_DEAD_OUTBOXES = 16  # looked at in one go; the rest when those are empty
OUTBOX_RETENTION_S = 7 * 24 * 3600  # how long a dead instance's rows wait for another instance
MAX_LEDGER_CONNECTIONS = 8  # pipelines in flight; while all are, commands gather into fewer and cheaper ones
MAX_LEDGER_SENDS = 4  # of one command: the first, a lost reply, scripts to reload, a window that turned
MAX_UNIX_PATH_BYTES = 107  # sun_path of Linux, without its closing zero
MAX_CACHED_MATCHES = 10_000  # callers whose budgets are remembered
MAX_CACHED_WINDOWS = 1_000  # zones and kinds of windows whose current bounds are remembered

# The processor --------------------------------------------------------------------------------------------------------
MAX_CACHED_HEADERS = 1_024  # headers as Envoy is told to set them, and lists of those to remove, likewise
MAX_VERIFIED_TOKENS = 10_000  # verified tokens remembered by hash
MAX_KEY_SET_BYTES = 256 * KIB
MIN_RSA_BITS = 2048  # NIST SP 800-131A; RFC 7518, 3.3
MIN_KEYS_MAX_AGE_S, MAX_KEYS_MAX_AGE_S = 60, 24 * 3600  # whatever the key server says
KEYS_FETCH_TIMEOUT_S = 5  # for the whole fetch; a shutdown may have to wait for it
KEYS_REFETCH_INTERVAL_S = 30  # an unknown `kid`, which anyone can make up, causes no more fetches than this
MAX_KEYS_BACKOFF_S = 60  # between attempts while the key server is down
GOOGLE_TOKEN_FETCH_TIMEOUT_S = 5  # for each attempt to fetch an access token, of which google-auth makes a few
GOOGLE_TOKEN_AHEAD_S = 300  # before a token expires; the metadata server hands out a new one only in its last minutes
MIN_GOOGLE_TOKEN_WAIT_S, MAX_GOOGLE_TOKEN_WAIT_S = 5, 3600  # between fetches, whatever a token server says
MAX_GOOGLE_TOKEN_BACKOFF_S = 60  # between attempts while it is down: at least four before the last token expires
MAX_SECRET_BYTES = 8 * KIB  # a provider's key must fit into a header
SECRET_FETCH_TIMEOUT_S = 5  # for one answer of Secret Manager's, its connection and its access token included
MIN_SECRET_BACKOFF_S, MAX_SECRET_BACKOFF_S = 0.5, 60.0  # between attempts while it gives no usable answer
SECRET_REFETCH_INTERVAL_S = 10  # however many answers say that a key is refused: cheap, and well below its quotas
SECRET_REREAD_INTERVAL_S = 1  # the same for keys in files
SECRETS_CLOSE_TIMEOUT_S = 1  # for all calls under way to end once their channel has
MIN_REDACTED_BYTES = 12  # a shorter "key" is a placeholder and may be a word of any answer; real ones have 32 and more
MAX_JOURNAL_QUEUE = 20_000  # records in memory, waiting for the journal's writer
MAX_JOURNAL_BATCH = 1_000  # records in one write of the journal, about 600 KB
MAX_SEGMENT_BYTES = 16 * MIB  # one file of the journal: what a shipper that fell behind deletes at a time
MAX_SHIP_BYTES = 1 * MIB  # one transaction of the usage store, about 2,000 rows
MAX_SHIP_BACKOFF_S = 30  # between attempts while the usage store is away: how late rows may come once it is back
MAX_INSERT_ROWS = 500  # of one insertAll: what Google recommends, and how many a crash may repeat
MAX_INSERT_BYTES = 8 * MIB  # of one insertAll, which BigQuery refuses above 10 MB
MAX_INSERT_ID_CHARS = 128  # BigQuery's own bound
INSERT_TIMEOUT_S = 10  # of one call to BigQuery, which answers in less than one
MISSING_COLUMN_S = 300  # how long a column that a table lacks is left out, before it is tried again
MAX_REJECTED_BYTES = 16 * MIB  # of rows that no usage store takes, kept for people; twice that, with the file before
MAX_SNAPSHOTS = 10_000  # budgets in one minute's snapshots; the fullest come first
MAX_POLICY_BYTES = 1 * MIB
MAX_POLICY_NODES = 100_000  # values in a policy, aliases expanded
MAX_POLICY_DEPTH = 16  # the format needs 4
POLICY_POLL_S = 1  # how soon a change of the policy file is seen
MAX_CACHED_PRICES = 4_096  # resolved prices: model names come from callers
PRICE_PERIOD_S = 1_800  # for which resolved prices are kept: all changes of prices in a day are at half hours
MAX_CACHED_TRAITS = 4_096  # models looked up in the catalogue, likewise
MAX_CACHED_WAYS = 4_096  # models whose route is remembered, likewise: 4 MB
MAX_CACHED_SECONDS = 64  # whose date is remembered as text: requests that overlap began in different ones
MAX_OFFERS = 2_000  # models in a list of them: more than any provider has, 150 KB
MAX_CACHED_OFFERS = 4  # policies, or sets of providers with a key, whose lists are remembered
MAX_MESSAGE_BYTES = MAX_REQUEST_BYTES + MIB  # one ext_proc message: a whole request body and its frame

# The wire transport (HTTP/2, RFC 9113) --------------------------------------------------------------------------------
MAX_CONCURRENT_STREAMS = 2_048  # of one connection; what envoy.yaml asks for
MAX_CONNECTIONS = 1_024  # of one server; envoy.yaml's circuit breaker
STREAM_WINDOW_BYTES = 1 * MIB  # a large prompt takes 33 round trips, on a socket that takes 50 µs for one
CONNECTION_WINDOW_BYTES = 16 * MIB
MAX_ASSEMBLED_BYTES = 512 * MIB  # messages of which a part has come, in one server: 15 of the largest
MAX_STREAM_QUEUED_BYTES = 2 * MAX_MESSAGE_BYTES  # answers that wait for the peer's windows
MAX_QUEUED_BYTES = 512 * MIB  # the same, of one connection
WRITE_HIGH_WATER_BYTES = 1 * MIB  # in the socket's buffer; above it content waits in its stream, and can be dropped
MAX_UNREAD_CONTROL_BYTES = 1 * MIB  # answers outside flow control that the peer does not read
MAX_FIELDS_BYTES = 16 * KIB  # of a request, announced as MAX_HEADER_LIST_SIZE; Envoy's calls have 0.5 KiB
MAX_FIELDS_DECODED_BYTES = 64 * KIB  # over this a block is a bomb, and the connection ends
MAX_BLOCK_BYTES = 64 * KIB  # HEADERS and its CONTINUATIONs
MAX_CONTINUATIONS = 16
MAX_CACHED_BLOCKS = 256  # header blocks whose fields are remembered
MAX_REMEMBERED_STREAMS = 2 * MAX_CONCURRENT_STREAMS  # ended streams on which frames may still be under way (5.1)
MAX_STATUS_MESSAGE_BYTES = 1 * KIB  # grpc-message
FLOOD_BURST = 10_000  # frames that carry nothing; Envoy's own bound on its queue of control frames
FLOOD_REFILL_PER_S = 1_000  # about 2% of a core
SETTINGS_FLOOD_COST = 100  # SETTINGS may touch every stream
MAX_SETTINGS = 32  # in one frame; there are fewer than ten
HANDSHAKE_TIMEOUT_S = 10.0  # until the preface and the acknowledgement of our SETTINGS have come
LINGER_S = 1.0  # for the peer to read why the connection ends
MAX_WORKERS = 4  # sockets that envoy.yaml lists for the processor; more cores want a longer list there

# Telemetry ------------------------------------------------------------------------------------------------------------
MAX_MODEL_SERIES = 500  # label sets of one metric by model, a histogram's with 16 lines each; models come from callers
METRICS_FILE_BYTES = 4 * MIB  # of each of a worker's three: room for all series that may be, at 250 bytes a line
MAX_CALLER_SERIES = 2_000  # of the cost, by who calls
MAX_BUDGET_SERIES = 1_000  # budgets on /metrics: those that are used most
MAX_OPEN_SPANS = 20_000  # requests under way whose spans are remembered
OTLP_FLUSH_S = 1  # of a shutdown, after the drain: a collector that does not answer gets no more
