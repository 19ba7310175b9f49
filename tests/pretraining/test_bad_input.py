"""What pretraining cannot use is told before it trains."""

import pytest
from tiny_runs import LINFORMER, TINY

from ordnung.scripts import pretrain
from ordnung.scripts.common.errors import ScriptError, run_script
from ordnung.scripts.common.options import arguments, parse_options
from ordnung.scripts.pretraining.options import PretrainOptions


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": ["--model_type", "convlm"]}, "unknown model_type 'convlm'; did you mean 'conv_lm'"),
        ({"model": []}, "give one of --model_type"),
        (
            {"model": ["--model_type=conv_lm", "--config_overrides", "hiden_size=8"]},
            "'hiden_size', which is no field of ConvLMConfig; did you mean 'hidden_size'",
        ),
        ({"model": ["--model_type=conv_lm", "--config_overrides", "hidden_size=abc"]}, "hidden_size"),
        (
            {"model": ["--model_type=conv_lm", "--config_overrides", "vocab_size=100"]},
            "300 tokens.*100.*vocab_size=300",
        ),
        ({"objective": "masked"}, "must be odd in a bidirectional model"),
        ({"model": ["--model_type=gpt2"], "objective": "masked"}, "gpt2 has no model for the masked objective"),
        ({"model": ["--model_name_or_path", "nowhere/nothing"]}, "nowhere/nothing cannot be made"),
        ({"model": ["--model_type=conv_lm", "--lerning_rate=1"]}, "'--lerning_rate=1'; did you mean 'learning_rate'"),
        ({"max_steps": "many"}, "--max_steps.*: invalid int value: 'many'"),
        ({"max_steps": 0}, "--max_steps must be at least 1, not 0"),
        ({"objective": "sideways"}, "sideways"),
        ({"train_file": "nothing*.txt"}, r"nothing\*.txt: no such file"),
        ({"train_file": None}, "give one of --train_file and --dataset_name"),
        ({"dataset_name": "x"}, "give one of --train_file and --dataset_name"),
        ({"dataset_config_name": "en"}, "--dataset_config_name en is of --dataset_name: leave it out"),
        ({"train_file": None, "dataset_name": "nowhere/nothing"}, "nowhere/nothing cannot be loaded"),
        ({"tokenizer_name": None}, "give --tokenizer_name, or --train_tokenizer_vocab_size"),
        ({"tokenizer_name": "nowhere/nothing"}, "no tokenizer can be loaded from nowhere/nothing"),
        ({"block_size": 100000}, "the training data holds .* tokens, less than one block of 100000"),
        ({"block_size": 2000}, "the held-out text holds .* --validation_fraction"),
        ({"max_steps": None, "streaming": True}, "--streaming needs --max_steps"),
        ({"streaming": True}, "nothing can be held out of a stream"),
        ({"report_to": "trackoi"}, "trackoi: unknown tracker.*trackio"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: .*min_lr"),
        ({"config": "nowhere.yaml"}, "--config nowhere.yaml: no such file"),
        (
            {"model": ["--model_type=softmax_lm", "--config_overrides", TINY + ",max_position_embeddings=16"]},
            r"32 is above the model's max_position_embeddings \(16\); set max_position_embeddings=32 in --config_ov",
        ),
        (
            {
                "model": [
                    *LINFORMER[:3],
                    LINFORMER[3] + ",max_position_embeddings=16,position_embedding_type=none",
                    "--objective=masked",
                ]
            },
            r"32 is above the model's max_position_embeddings \(16\)",
        ),
    ],
)
def test_bad_input_is_told_before_training(run, tmp_path, options, message):
    with pytest.raises(ScriptError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_unknown_keys_in_a_file_are_errors(run, tmp_path):
    (tmp_path / "run.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(ScriptError, match="'lerning_rate' in .*run.yaml; did you mean 'learning_rate'"):
        run(config=tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("- a\n- b\n")
    with pytest.raises(ScriptError, match="option: value"):
        run(config=tmp_path / "run.yaml")


def test_null_is_no_value_or_refused(tmp_path):
    words = ["--model_type=conv_lm", "--output_dir=any", "--train_file=any", "--tokenizer_name=any"]
    file = tmp_path / "run.yaml"
    file.write_text("eval_steps: null\nseed: 3\n")
    found = parse_options(PretrainOptions, ["--config", str(file), *words])
    assert found.eval_steps is None and found.seed == 3
    assert parse_options(PretrainOptions, ["--config", str(file), *words, "--eval_steps=7"]).eval_steps == 7
    assert parse_options(PretrainOptions, [*words, *arguments({"eval_steps": None})]).eval_steps is None
    assert parse_options(PretrainOptions, [*words, *arguments({"run_name": "null"})]).run_name == "null"
    for name, message in (
        ("block_size", "--block_size null: it cannot be nothing; leave it out for its default, 512"),
        ("output_dir", "--output_dir null: it cannot be nothing; give it a value"),
        ("lerning_rate", "unknown option '--lerning_rate'; did you mean 'learning_rate'"),
    ):
        with pytest.raises(ScriptError, match=message):
            parse_options(PretrainOptions, [*words, *arguments({name: None})])


def test_errors_end_the_program_with_one_line(tmp_path):
    words = ["--model_type", "convlm", "--train_file", "x.txt", "--train_tokenizer_vocab_size", "300"]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: pretrain.main([*words, "--output_dir", str(tmp_path / "x")]))
    assert end.value.code.startswith("error: unknown model_type 'convlm'") and "\n" not in end.value.code
    assert not (tmp_path / "x").exists()
