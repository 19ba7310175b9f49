"""RetentionLM, a family of ordnung that lives in a package of its own: importing this makes it known."""

import ordnung

ordnung.register_family(
    "retention_lm",
    "RetentionLM",
    configuration="retention.configuration_retention_lm",
    modeling="retention.modeling_retention_lm",
)
