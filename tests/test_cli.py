"""The command `ordnung`: what it lists, that every program answers --help lightly and completely, installed configs."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from ordnung.scripts import benchmark, cli
from ordnung.scripts.benchmarks.variants import Shape
from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.machine import command_line
from ordnung.scripts.common.options import parse_options
from ordnung.scripts.pretraining.options import PretrainOptions
from ordnung.scripts.training.options import Schedule

SCRIPTS = Path(cli.__file__).parent
OF_THE_CLONE = {"cli", "make_cards"}

# Every help text as JSON, and what was imported for them.
HELPS = """
import io, json, sys
from contextlib import redirect_stdout
from ordnung.scripts import cli
texts = {}
for command in ["--help", *cli.PROGRAMS]:
    sys.argv = ["ordnung", command, "--help"]
    with redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(sys.argv[1:])
        except SystemExit as end:
            assert end.code == 0, command
    texts[command] = out.getvalue()
    if command == "--help":
        first = set(sys.modules)
models = ("ordnung.modeling.modeling_", "datasets.")
heavy = [name for name in sys.modules if name == "torch" or name.startswith(models)]
first &= {"torch", "transformers"}
print(json.dumps({"texts": texts, "heavy": heavy, "first": list(first)}))
"""


def run(*command, **kwargs):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    done = run(sys.executable, "-c", HELPS, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_program_is_a_command():
    assert {*cli.PROGRAMS.values(), *OF_THE_CLONE} == {path.stem for path in SCRIPTS.glob("*.py")} - {"__init__"}


def test_the_overview_has_a_line_for_each_and_imports_nothing(helps):
    lines = dict(re.findall(r"^  (\S+) +(\S.*)$", helps["texts"]["--help"], re.M))
    assert lines.keys() == {*cli.PROGRAMS, *cli.OTHERS}
    assert all(line.endswith((".", "?")) and len(line) <= 100 for line in lines.values())
    assert helps["first"] == []


def test_help_needs_no_model(helps):
    assert helps["heavy"] == []


@pytest.mark.parametrize("command", cli.PROGRAMS)
def test_help_shows_every_option_once(command, helps):
    text = helps["texts"][command]
    shown = re.findall(r"^  (?:-h, )?(--\S+)", text, re.M)
    assert text.startswith(f"usage: ordnung {command} [options]\n\n{cli.summary(cli.PROGRAMS[command])}\n")
    assert len(shown) == len(set(shown)) and {"--help", "--config"} <= set(shown)
    assert not any(name.startswith("--no_") for name in shown)
    assert not re.search(r"^  --\S.*, --", text, re.M)  # by one name
    sections = re.findall(r"^(\S.*):\n  -", text, re.M)
    of_data = [title for title in sections if title in ("model", "models", "data")]
    assert sections[: len(of_data)] == of_data == sorted(of_data, reverse=True) and sections[-1] == "other"


def test_all_options_of_a_program_are_shown(helps):
    shown = set(re.findall(r"^  --(\S+)", helps["texts"]["pretrain"], re.M))
    assert shown == {*PretrainOptions.__dataclass_fields__, "config"}


@pytest.mark.parametrize(
    "start",
    [["-m", "ordnung.scripts.cli", "plot-loss"], ["-m", "ordnung.scripts.plot_loss"], [SCRIPTS / "plot_loss.py"]],
)
def test_a_program_is_the_same_whichever_way_it_starts(start, tmp_path):
    done = run(sys.executable, *start, "--run", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == f"error: {tmp_path / 'none'} cannot be read: [Errno 2] No such file or directory: '{tmp_path / 'none'}'\n"
    )


def test_a_wrong_command_is_told():
    with pytest.raises(ScriptError, match="unknown command 'pretrian'; did you mean 'pretrain'"):
        cli.main(["pretrian", "--help"])


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_installed_configs_and_texts_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse_options(PretrainOptions, ["--config", "demo", "--max_steps", "7"])
    assert options.model_type == "conv_lm" and options.max_steps == 7
    (found,) = corpus.find_files(options.train_file, "train_file")
    assert corpus.read_text(found).count("whale") > 500
    # what lies in the folder wins
    (tmp_path / "demo").write_text("model_type: softmax_lm\ntrain_file: a.txt\ntrain_tokenizer_vocab_size: 300\n")
    assert parse_options(PretrainOptions, ["--config", "demo", "--output_dir", "x"]).model_type == "softmax_lm"
    (tmp_path / "moby_dick.txt").write_text("other")
    assert corpus.find_files(["moby_dick.txt"], "train_file") == ["moby_dick.txt"]
    with pytest.raises(ScriptError, match="--config demi: no such file; did you mean 'demo'.*recall_conv"):
        parse_options(PretrainOptions, ["--config", "demi"])


def test_commands_are_recorded_as_they_are_typed():
    words = ["--hub_token", "secret", "--output_dir", "out/a b"]
    assert command_line(["/somewhere/bin/ordnung", "pretrain", *words]) == (
        "ordnung pretrain --hub_token ... --output_dir 'out/a b'"
    )
    assert shlex.split(command_line(["scripts/pretrain.py", *words]))[1:3] == ["scripts/pretrain.py", "--hub_token"]


def test_defaults_and_names_are_those_of_the_libraries():
    from transformers.trainer_utils import SchedulerType

    fields, shape = benchmark.BenchmarkOptions(), Shape()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "kernel_size"):
        assert getattr(fields, name) == getattr(shape, name)
    assert set(Schedule.__args__) <= {kind.value for kind in SchedulerType}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def chatting(tmp_path, tokenizer):
    """A checkpoint whose tokenizer has a chat template."""
    config = AutoConfig.for_model(
        "linformer_lm",
        is_decoder=True,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projected_size=4,
        position_embedding_type="none",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="needs what serves: pip install 'transformers[serving]'")
def test_serve_answers_a_chat(chatting, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "ordnung.scripts.cli", "serve", chatting, "--device", "cpu", "--port", port]
    body = {"model": str(chatting), "messages": [{"role": "user", "content": "the whale"}], "max_tokens": 5}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(list(map(str, command)), stdout=log, stderr=log) as server,
    ):
        try:
            answer = None
            for _ in range(240):
                request = urllib.request.Request(
                    f"http://localhost:{port}/v1/chat/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                try:
                    with urllib.request.urlopen(request, timeout=120) as response:
                        answer = json.loads(response.read())
                    break
                except urllib.error.HTTPError as error:
                    pytest.fail(error.read().decode())
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
        finally:
            server.terminate()
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"] and answer["usage"]["completion_tokens"] == 5


@pytest.mark.skipif(is_serve_available(), reason="what serves is installed")
def test_serve_says_what_it_needs(chatting):
    with pytest.raises(ScriptError, match=r"pip install \"ordnung\[serving\]\""):
        cli.main(["serve", str(chatting)])


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_transformers_own_commands_show_their_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code in (0, None) and f"ordnung {command}" in capsys.readouterr().out


def test_the_installed_command_says_errors_in_a_line(tmp_path):
    command = Path(sys.executable).with_name("ordnung")
    if not command.exists():
        pytest.skip("this environment was installed before there was the command")
    done = run(command, "generate", "--model_name_or_path", "./none", cwd=tmp_path, env={**os.environ})
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == "error: no such checkpoint folder: ./none\n"
