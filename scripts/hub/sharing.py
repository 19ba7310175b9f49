"""Sharing a checkpoint on the Hugging Face Hub, for push_to_hub.py and for the training scripts.

A training script inherits `HubOptions`, calls `find_target` before it trains and `push` when its results are written:

    target = find_target(options, output_dir)      # None without --push_to_hub; a wrong token is told now
    ...
    if target is not None:
        push(output_dir, target)                   # main process only, after everything else is on disk

What is shared is first written whole to the folder `hub` of the checkpoint; no failure on the way to the Hub touches
it or the checkpoint.
"""

import json
import logging
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

import ordnung
from ordnung.modeling.standalone import WEIGHTS
from ordnung.scripts.common import limits
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.files import read_json, write_text
from ordnung.scripts.hub.model_card import Subject, eval_result_files, head_of, make_card
from ordnung.scripts.hub.options import COMMIT_MESSAGE, LICENSE, REVISION, HubOptions

logger = logging.getLogger(__name__)

FOLDER = "hub"
# Pauses before a commit whose connection broke is tried again, in seconds; uploads of weights have their own retries.
PAUSES = (1, 5)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# The folder in an adapter's that fine-tuning has it load as its base, and the file in there that names what was tuned.
BASE, BASE_NOTE = "base", "base_model.json"
PEFT_HEADS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes on the Hub, and what its card says of it beyond its results."""

    repo_id: str
    private: bool = False
    revision: str = REVISION
    commit_message: str = COMMIT_MESSAGE
    license: str = LICENSE
    language: list[str] | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token)

    @property
    def url(self) -> str:
        branch = "" if self.revision == "main" else f"/tree/{self.revision}"
        return f"{constants.ENDPOINT}/{self.repo_id}{branch}"


def find_target(options: HubOptions, output_dir: str | Path, suffix: str = "") -> Target | None:
    """The target that a training script's options name, checked with the Hub; None without --push_to_hub.

    `suffix` is appended to the name of the repository.

    Raises:
        ScriptError: as `check_target`; hub options without --push_to_hub.
    """
    if not options.push_to_hub:
        for name in ("hub_model_id", "hub_private", "hub_revision"):
            if getattr(options, name):
                raise ScriptError(f"--{name} does nothing without --push_to_hub: add it, or leave both out")
        return None
    target = Target(
        repo_id=(options.hub_model_id or Path(output_dir).resolve().name) + suffix,
        private=options.hub_private,
        revision=options.hub_revision or "main",
        license=options.hub_license,
        token=options.hub_token,
    )
    return check_target(target)


def with_namespace(target: Target, name: str) -> Target:
    """The target with a user's name before a bare repository name.

    Raises:
        ScriptError: a malformed name.
    """
    try:
        validate_repo_id(target.repo_id)
    except ValueError as error:
        raise ScriptError(f"cannot push to {target.repo_id}: {reason(error)}") from error
    return target if "/" in target.repo_id else replace(target, repo_id=f"{name}/{target.repo_id}")


def check_target(target: Target) -> Target:
    """Ask the Hub whether the token may write to the target; nothing is made there.

    Returns:
        the target with the user's name before a bare repository name.
    Raises:
        ScriptError: no token, a wrong one or one that may only read; no way to the Hub; another's namespace; a public
            repository that was asked to be private; a malformed name.
    """
    try:
        with_namespace(target, "any")  # a malformed name needs no network to be told
        user = target.api.whoami()
        target = with_namespace(target, user["name"])
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ScriptError(f"the token of {user['name']} may only read: make one that may write and use that")
        try:
            private = target.api.model_info(target.repo_id).private
            target.api.auth_check(target.repo_id, write=True)
        except RepositoryNotFoundError:
            namespace = target.repo_id.partition("/")[0]
            own = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
            if namespace not in own:
                raise ScriptError(
                    f"the token is {user['name']}'s, who cannot make a repository for {namespace!r}; there are "
                    f"{', '.join(own)}"
                ) from None
        else:
            if target.private and not private:
                raise ScriptError(
                    f"{target.repo_id} is there already and public: make it private in its settings on the Hub, or "
                    "name another"
                )
    except (HTTPError, OSError, ValueError) as error:  # a ValueError: what answered is no Hub
        raise ScriptError(f"cannot push to {target.repo_id}: {reason(error)}") from error
    return target


def reason(error: Exception) -> str:
    """What went wrong on the way to the Hub, and the cure where there is one, on one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no access token; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} refuses the access token; make a new one, or see which is used by `hf auth whoami`"
        )
    if status == 403:
        return "the access token may not write there; use one that may"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}); see the network and HF_ENDPOINT"
        )
    return " ".join(f"{type(error).__name__}: {error}".split())


def push(checkpoint: str | Path, target: Target, results: str | Path | None = None) -> str:
    """Write the folder to share and upload it in one commit.

    Args:
        checkpoint: folder with model and tokenizer, or with a PEFT adapter.
        target: from `find_target` or `check_target`.
        results: the results file; default: that of the checkpoint, if there is one.

    Returns:
        the address of what was pushed.
    Raises:
        ScriptError: as `write_folder`, or the upload failed: the message says how to push again.
    """
    folder = write_folder(checkpoint, target, results)
    try:
        upload(folder, target)
    # whatever it is, the model is safe and the user is told how to go on
    except Exception as error:
        raise ScriptError(
            f"{folder} is complete, but it was not uploaded to {target.url}: {reason(error)}\n"
            f"push it again by: {retry_command(checkpoint, target, results)}"
        ) from error
    logger.info(f"pushed to {target.url}")
    return target.url


def show(folder: Path, target: Target):
    """Print what an upload of the folder would do."""
    where = f"{target.url}{' (private, if new)' if target.private else ''}"
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    print(f"{folder} would go to {where} as {target.commit_message!r}:\n")
    for name, size in sorted(sizes.items()):
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files\n\nREADME.md:\n")
    print((folder / "README.md").read_text(encoding="utf-8"), end="")


def retry_command(checkpoint: str | Path, target: Target, results: str | Path | None) -> str:
    """The command that does the same push again; the token is left out."""
    options = ["--model_name_or_path", str(checkpoint), "--hub_model_id", target.repo_id]
    options += ["--results", str(results)] if results is not None else []
    for name in ("revision", "commit_message", "license"):
        if getattr(target, name) != getattr(Target, name):
            options += [f"--{name}", getattr(target, name)]
    options += ["--language", *target.language] if target.language else []
    options += ["--private"] if target.private else []
    return shlex.join(["ordnung", "share", *options])


def upload(folder: Path, target: Target):
    """Upload the folder in one commit, so that nobody ever loads half of it; what is there already is not sent again.

    `HfApi.upload_folder` does not promise that: with hf_xet it commits a large folder in several parts. What an earlier
    push left that is not true of this model goes with the same commit, other files stay. What a broken
    connection ended is tried again: if it had arrived, there is nothing left to do.
    """
    api = target.api
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for pause in (*PAUSES, None):
        try:
            api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
            if target.revision != "main":
                api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
            # all anew for each attempt: what the Hub has may be what the last one sent
            old = outdated_files(api, target)
            operations = [CommitOperationAdd(name, folder / name) for name in names]
            operations += [CommitOperationDelete(name) for name in sorted(old.difference(names))]
            api.create_commit(
                target.repo_id, operations, commit_message=target.commit_message, revision=target.revision
            )
            return
        except HTTPError as error:
            broken = not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500
            if pause is None or not broken:
                raise
            logger.warning(f"the upload broke off ({type(error).__name__}: {error}); trying again in {pause} s")
            time.sleep(pause)


def outdated_files(api: HfApi, target: Target) -> set[str]:
    """What earlier pushes left in the repository: weights, adapter, results, options, and the scores of these results.

    A results file that no training script wrote is not taken for one of these.
    """
    there = set(api.list_repo_files(target.repo_id, revision=target.revision))
    old = {name for name in there if WEIGHTS.fullmatch(name) or name in ADAPTER}
    if "results.json" in there:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(target.repo_id, "results.json", revision=target.revision, local_dir=folder)
            try:
                results = read_json(Path(path))
                if "machine" in results:
                    old |= there & {"results.json", "run.yaml", *eval_result_files(results)}
            except (ScriptError, ValueError, TypeError):
                logger.debug(f"results.json of {target.repo_id} is none of a training script")
    return old


def write_folder(checkpoint: str | Path, target: Target, results: str | Path | None = None) -> Path:
    """Write what is shared to the folder `hub` of the checkpoint, in place of what an earlier call left there.

    It holds the stand-alone model (weights, config, generation config, the code of its family) or the adapter, the
    tokenizer, the card, evaluation results in the Hub's format, the results file, and run.yaml if there is one.

    Raises:
        ScriptError: no checkpoint or tokenizer, a results file that cannot be read, an adapter whose base model is
            not on the Hub.
    """
    checkpoint = Path(checkpoint)
    config_file, adapter_file = checkpoint / "config.json", checkpoint / "adapter_config.json"
    if not (config_file.is_file() or adapter_file.is_file()):
        raise ScriptError(f"{checkpoint} holds no config.json: give the folder that a training script wrote")
    shared = {name: getattr(target, name) for name in ("repo_id", "revision", "license", "language")}
    has_run_file = (checkpoint / "run.yaml").is_file()
    subject = Subject(**shared, results=_read_results(checkpoint, results), has_run_file=has_run_file)
    staging, folder = checkpoint / f".tmp-{FOLDER}", checkpoint / FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        if adapter_file.is_file():
            _write_adapter(checkpoint, staging, subject)
        else:
            _write_model(checkpoint, staging, subject)
        make_card(subject).save(staging / "README.md")
        for name, text in eval_result_files(subject.results).items():
            (staging / name).parent.mkdir(exist_ok=True)
            write_text(staging / name, text)
        if subject.results:
            write_text(staging / "results.json", json.dumps(subject.results, indent=2) + "\n")
        if subject.has_run_file:
            shutil.copy(checkpoint / "run.yaml", staging)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _read_results(checkpoint: Path, results: str | Path | None) -> dict:
    if results is not None:
        path = Path(results)
    else:
        places = [checkpoint / "results.json", checkpoint / "linearize_results.json"]
        if checkpoint.resolve().name == "merged":
            places.append(checkpoint.resolve().parent / "results.json")  # of the run whose adapters were merged
        path = next((place for place in places if place.exists()), None)
    if path is None:
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ScriptError(f"the results file {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ScriptError(f"the results file {path} must hold an object, not a {type(content).__name__}")
    return content


def _write_model(checkpoint: Path, folder: Path, subject: Subject):
    """Load the model by the class that its config names, save it for strangers, and note it in the subject."""
    try:
        name = (AutoConfig.from_pretrained(checkpoint).architectures or ["none"])[0]
        model_class = getattr(ordnung, name, None) or getattr(transformers, name, None)
        if model_class is None:
            raise ScriptError(f"{checkpoint} holds a model of class {name}, which neither ordnung nor transformers has")
        subject.head = head_of(name)
        subject.model, report = model_class.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
        if report["missing_keys"]:
            raise ScriptError(f"{checkpoint} lacks weights: {', '.join(sorted(report['missing_keys']))}")
        tokenizer = limits.fit_tokenizer(AutoTokenizer.from_pretrained(checkpoint), subject.model)
    # a RuntimeError: weights of other sizes
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ScriptError(f"model or tokenizer of {checkpoint} cannot be loaded: {error}") from error
    if subject.remote_code:
        ordnung.save_standalone(subject.model, folder, tokenizer)
    else:
        subject.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_adapter(checkpoint: Path, folder: Path, subject: Subject):
    adapter = read_json(checkpoint / "adapter_config.json")
    base = checkpoint / BASE
    if (base / BASE_NOTE).is_file():
        adapter |= read_json(base / BASE_NOTE)
    subject.base_model = adapter.get("base_model_name_or_path")
    if not subject.base_model or Path(subject.base_model).exists():
        raise ScriptError(
            f"{checkpoint} is an adapter for {subject.base_model}, which others do not have: push that model and "
            "train with its Hub name, or merge the adapter (merge_and_unload) and push the merged model"
        )
    subject.head = PEFT_HEADS.get(adapter.get("task_type"), "Model")
    config_file = next((path / "config.json" for path in (base, checkpoint) if (path / "config.json").is_file()), None)
    if config_file is not None:
        config = read_json(config_file)
        # JSON has made strings of the numbers
        subject.labels = {int(number): name for number, name in config.get("id2label", {}).items()}
    for path in checkpoint.glob("adapter_*"):
        shutil.copy(path, folder)
    write_text(folder / "adapter_config.json", json.dumps(adapter, indent=2) + "\n")
    try:
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ScriptError(f"the tokenizer of {checkpoint} cannot be loaded: {error}") from error
