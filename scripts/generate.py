"""Write text with a checkpoint: `python scripts/generate.py --model_name_or_path out/demo --prompt "Call me"`.

Text appears on stdout as it is made, the speed on stderr. Without a sampling option decoding is what the checkpoint's
generation config says, which is greedy if it says nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
from transformers.utils import logging

import ordnung  # noqa: F401  (makes the model types known to the Auto classes)
from ordnung.scripts.common import ScriptError, run_script


def positive(kind):
    def parse(text):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def probability(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def build_parser():
    parser = argparse.ArgumentParser(description="Write text with a checkpoint.")
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint folder or Hub name")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="one or more texts to continue; default: standard input")
    source.add_argument("--prompt_file", nargs="+", type=Path, help="files to continue, each a prompt")
    parser.add_argument("--max_new_tokens", type=positive(int), default=200)
    parser.add_argument("--num_return_sequences", type=positive(int), default=1, help="texts per prompt")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    sampling = parser.add_argument_group("sampling (any of these switches it on)")
    sampling.add_argument("--temperature", type=positive(float), help="1 samples from the model as it is")
    sampling.add_argument("--top_k", type=positive(int), help="sample from the k likeliest tokens")
    sampling.add_argument(
        "--top_p", type=probability, help="sample from the likeliest tokens of this total probability"
    )
    parser.add_argument("--repetition_penalty", type=positive(float), help="above 1: tokens used before get unlikelier")
    return parser


def read_prompts(args):
    """The prompts as texts: from the command line, files or standard input (whole, less one final line break)."""
    if args.prompt:
        return args.prompt
    try:
        texts = [path.read_text(encoding="utf-8") for path in args.prompt_file or []] or [sys.stdin.read()]
    except OSError as error:
        raise ScriptError(f"cannot read the prompt file {error.filename}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScriptError(f"the prompt is not UTF-8 text: {error}") from None
    return [text.removesuffix("\n") for text in texts]


def check_folder(name):
    """Say what is wrong with a local path before it is looked up as a Hub name, which takes a minute offline."""
    path = Path(name)
    if path.is_dir():
        if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
            raise ScriptError(f"{name} holds no config.json: give the folder that save_pretrained or pretrain.py wrote")
    elif path.exists():
        raise ScriptError(f"{name} is a file: give the checkpoint's folder")
    elif len(path.parts) > 2 or name.startswith((".", "~")) or (len(path.parts) == 2 and path.parent.is_dir()):
        raise ScriptError(f"no such checkpoint folder: {name}")


def load(name, trust_remote_code):
    """Model and tokenizer of a folder or Hub name, the model on the accelerator if there is one."""
    check_folder(name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ScriptError(f"cannot load a causal language model from {name}: {error}") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ScriptError(f"{name} is no causal language model checkpoint: it has no {missing}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ScriptError(
            f"cannot load a tokenizer from {name}; put one there with tokenizer.save_pretrained: {error}"
        ) from None
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def encode(prompt, tokenizer, model):
    """Token ids of a prompt, (1, N); an empty prompt becomes the token that begins a text."""
    ids = tokenizer(prompt)["input_ids"]
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


def main(argv=None):
    args = build_parser().parse_args(argv)
    logging.disable_progress_bar()
    model, tokenizer = load(args.model_name_or_path, args.trust_remote_code)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if options.keys() - {"repetition_penalty"}:
        options["do_sample"] = True
    if args.num_return_sequences > 1 and not options.get("do_sample", model.generation_config.do_sample):
        raise ScriptError("--num_return_sequences above 1 needs sampling, else all are equal: add --temperature 1")
    if args.seed is not None:
        set_seed(args.seed)

    prompts = [encode(prompt, tokenizer, model) for prompt in read_prompts(args)]
    many = len(prompts) * args.num_return_sequences > 1
    new_tokens, start = 0, time.perf_counter()
    for i, input_ids in enumerate(prompts):
        for j in range(args.num_return_sequences):
            if many:
                print(f"--- prompt {i + 1}, text {j + 1} ---", flush=True)
            streamer = TextStreamer(tokenizer, skip_special_tokens=True)
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=args.max_new_tokens,
                streamer=streamer,
                **options,
            )
            new_tokens += output.shape[1] - input_ids.shape[1]
    seconds = time.perf_counter() - start
    print(f"{new_tokens} tokens in {seconds:.2f} s: {new_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        run_script(main)
    except KeyboardInterrupt:
        sys.exit("\nstopped")
