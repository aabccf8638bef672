"""The local stack: what `make up` and the tests run beside the processor."""
