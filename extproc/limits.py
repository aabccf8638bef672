"""Every bound, with its reason. What is not named here is not bounded, and that is a defect."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# Requests -------------------------------------------------------------------------------------------------------------
MAX_REQUEST_BYTES = 32 * MIB  # what Cloud Run itself accepts over HTTP/1; Envoy's buffer limit is the same figure
MAX_JSON_DEPTH = 64  # deeper than any tool schema seen in the recorded requests (17), shallow enough to recurse over
MAX_INTEGER_DIGITS = 20  # CPython's own integer parsing is quadratic; no field of the API needs more than 64 bits
MAX_CHOICES = 128  # OpenAI's own bound on `n`
MAX_MESSAGES = 16_384
MAX_MODEL_NAME_CHARS = 256
MAX_TOKEN_BYTES = 16 * KIB  # an ID token is 1–2 KB; Envoy's own header limit is 60 KB
MAX_USER_CHARS = 320  # the longest e-mail address (RFC 3696, errata 1690)

# Responses ------------------------------------------------------------------------------------------------------------
MAX_EVENT_BYTES = 8 * MIB  # one SSE event: an image in base64 fits, a stream without line ends does not
MAX_ANSWER_BYTES = 32 * MIB  # a whole JSON answer, kept to read its usage
MAX_ERROR_BYTES = 1 * MIB  # a provider's error body, kept to take secrets out

# Counting -------------------------------------------------------------------------------------------------------------
INLINE_COUNT_CHARS = 4_000  # about 0.5 ms of tiktoken; a longer prompt is counted in a thread
COUNT_SLICE_CHARS = 16_384  # the longest text tiktoken is given at once: its regex and merges are super-linear
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

# The processor --------------------------------------------------------------------------------------------------------
MAX_VERIFIED_TOKENS = 10_000  # verified tokens remembered by hash
MAX_KEY_SET_BYTES = 256 * KIB
MAX_JOURNAL_QUEUE = 20_000  # records in memory, waiting for the journal's writer
MAX_POLICY_BYTES = 1 * MIB
