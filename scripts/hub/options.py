"""The options of a training program that can share what it trained."""

from dataclasses import dataclass

from ordnung.scripts.common.options import option

REVISION, LICENSE, COMMIT_MESSAGE = "main", "apache-2.0", "Model, tokenizer, code and card"


@dataclass(kw_only=True)
class HubOptions:
    """Options of a training script that can share what it trained."""

    push_to_hub: bool = option(False, "Share the result on the Hugging Face Hub.", section="sharing")
    hub_model_id: str | None = option(None, "Repository, user/name; default: the token's user and output_dir's name.")
    hub_private: bool = option(False, "Make a new repository that only you can see.")
    hub_revision: str | None = option(None, "Branch to push to; default: main.")
    hub_license: str = option(LICENSE, "Licence of the weights, as the Hub names it.")
    hub_token: str | None = option(None, "Access token; better HF_TOKEN or `hf auth login`, which leave no trace.")


# How and where a run is shared is not part of the run, and its token is nobody else's business.
NOT_RECORDED = ("push_to_hub", "hub_model_id", "hub_private", "hub_revision", "hub_license", "hub_token")
