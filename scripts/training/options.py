"""What the options of several training programs share."""

from typing import Literal

# The schedules of transformers' SchedulerType that need no further program. Not that class itself: it imports torch,
# which --help does without.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
