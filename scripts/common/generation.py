"""Text written with a checkpoint."""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
from transformers.utils import logging

import ordnung  # noqa: F401  (makes the model types known to the Auto classes)
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.models import check_folder, check_whole, check_writes_text


def read_prompts(options) -> list[str]:
    """The prompts as texts: from the command line, files or standard input (whole, less one final line break)."""
    if options.prompt:
        return options.prompt
    try:
        texts = [Path(name).read_text(encoding="utf-8") for name in options.prompt_file or []] or [sys.stdin.read()]
    except OSError as error:
        raise ScriptError(f"cannot read the prompt file {error.filename}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScriptError(f"the prompt is not UTF-8 text: {error}") from None
    return [text.removesuffix("\n") for text in texts]


def load(name, trust_remote_code):
    """Model and tokenizer of a folder or Hub name, the model on the accelerator if there is one."""
    check_folder(name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ScriptError(f"cannot load a causal language model from {name}: {error}") from None
    check_writes_text(model.config, name)
    check_whole(report, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ScriptError(
            f"cannot load a tokenizer from {name}; put one there with tokenizer.save_pretrained: {error}"
        ) from None
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def encode(prompt, tokenizer, model):
    """Token ids of a prompt, (1, N); an empty prompt becomes the token that begins a text."""
    ids = tokenizer(prompt, verbose=False)["input_ids"]  # verbose, it warns of what the model takes
    if not ids:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ScriptError(
                "the prompt is empty and the tokenizer has no bos or eos token to begin with: give a prompt"
            )
        ids = [start]
    vocab_size = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocab_size:
        raise ScriptError(
            f"the prompt holds token {max(ids)}, but the model's vocabulary has {vocab_size}: "
            "this tokenizer belongs to another model"
        )
    return torch.tensor([ids], device=model.device)


def run(options) -> int:
    """Write a text for each prompt of generate.py's options; returns the exit status."""
    logging.disable_progress_bar()
    model, tokenizer = load(options.model_name_or_path, options.trust_remote_code)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    sampling = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if sampling.keys() - {"repetition_penalty"}:
        sampling["do_sample"] = True
    if options.num_return_sequences > 1 and not sampling.get("do_sample", model.generation_config.do_sample):
        raise ScriptError("--num_return_sequences above 1 needs sampling, else all are equal: add --temperature 1")
    if options.seed is not None:
        set_seed(options.seed)

    prompts = [encode(prompt, tokenizer, model) for prompt in read_prompts(options)]
    many = len(prompts) * options.num_return_sequences > 1
    new_tokens, start = 0, time.perf_counter()
    for i, input_ids in enumerate(prompts):
        for j in range(options.num_return_sequences):
            if many:
                print(f"--- prompt {i + 1}, text {j + 1} ---", flush=True)
            streamer = TextStreamer(tokenizer, skip_special_tokens=True)
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=options.max_new_tokens,
                streamer=streamer,
                **sampling,
            )
            new_tokens += output.shape[1] - input_ids.shape[1]
    seconds = time.perf_counter() - start
    print(f"{new_tokens} tokens in {seconds:.2f} s: {new_tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0
