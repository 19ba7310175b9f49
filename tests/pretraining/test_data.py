"""Text, tokenizers, packing, order and batches of the pretraining script."""

import gzip
import json

import datasets
import numpy as np
import pytest
import torch

from ordnung.scripts.common import corpus
from ordnung.scripts.common.errors import ScriptError
from ordnung.scripts.common.options import parse_key_values
from ordnung.scripts.pretraining import data as pretrain_setup
from ordnung.scripts.pretraining.blocks import (
    IGNORED,
    BatchMaker,
    PlacedBlocks,
    ShuffledBlocks,
    StreamedBlocks,
    best_fit,
    pack,
)
from ordnung.scripts.pretraining.options import PretrainOptions

WORDS = "whale ship the a of and sailed harpoon, white wind; storm. night\nday wind\n\n mast\n élan 日本 🐋".split(" ")


def make_text(words: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in random.integers(len(WORDS), size=words))


@pytest.fixture(scope="module")
def documents():
    return [make_text(words, seed) for seed, words in enumerate([50, 3, 200, 1, 120, 80, 400, 7])]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return corpus.train_tokenizer(documents, 300, masked=True)


def as_data(texts):
    return datasets.Dataset.from_list([{"text": text} for text in texts])


def encoded(documents, tokenizer):
    return [ids for ids, _ in corpus.tokenize(documents, tokenizer)]


def test_held_out_bytes_are_those_of_the_blocks(documents, tokenizer):
    """The first blocks of a document whose second half has other characters."""
    named = dict.fromkeys(("output_dir", "tokenizer_name"), "any")
    options = PretrainOptions(**named, model_type="conv_lm", train_file=["any"], block_size=16, max_eval_blocks=3)
    text = documents[6] + "и" * 5000
    held_out = pretrain_setup.held_out_blocks(options, as_data([text]), tokenizer)
    tokens = encoded([text], tokenizer)[0][:48]
    assert held_out.blocks.reshape(-1).tolist() == tokens.tolist()
    size = len(tokenizer.decode(tokens).encode())
    assert held_out.tokens_per_byte == pytest.approx(48 / size, rel=3 / size)


def test_key_values_are_typed():
    text = "hidden_size=64,dropout=1e-1,gate=none,layer_types=[conv,full_attention],use=true,pad=None,k=[3,5]"
    assert parse_key_values(text) == {
        "hidden_size": 64,
        "dropout": 0.1,
        "gate": "none",
        "layer_types": ["conv", "full_attention"],
        "use": True,
        "pad": None,
        "k": [3, 5],
    }
    assert parse_key_values('{"a": {"b": 1}}') == {"a": {"b": 1}}
    with pytest.raises(ScriptError, match="'hidden_size'.*name=value"):
        parse_key_values("hidden_size")


def test_trained_tokenizer_represents_every_text(tokenizer, tmp_path):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}) == 3
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    text = " \tnever seen: ÅΩ漢字🎉\x01\r\n  end "
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, corpus.load_tokenizer(str(tmp_path))):
        assert loaded.decode(loaded(text)["input_ids"]) == text
    with pytest.raises(ScriptError, match="at least 259, not 200"):
        corpus.train_tokenizer(["text"], 200, masked=True)


def test_pieces_tokenize_as_the_whole(tokenizer, monkeypatch):
    text = make_text(3000, seed=1) + "\n\n\n  indented\n \n end\n"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 100)
    assert len(corpus.split_pieces(text)) > 100
    assert "".join(corpus.split_pieces(text)) == text
    ((ids, size),) = corpus.tokenize([text], tokenizer)
    assert ids.tolist() == [*whole, tokenizer.eos_token_id]
    assert size == len(text.encode())


def test_tokenize_is_the_same_in_any_grouping(tokenizer, documents, monkeypatch):
    expected = encoded(documents, tokenizer)
    monkeypatch.setattr(corpus, "GROUP_CHARACTERS", 300)
    grouped = encoded(["", *documents, ""], tokenizer)
    assert len(grouped) == len(documents)
    for a, b in zip(grouped, expected):
        np.testing.assert_array_equal(a, b)


def test_documents_follow_one_another_in_blocks():
    blocks, lengths, left = pack([np.arange(5), np.arange(10, 16)], 4, separate=False, carried=np.array([90]))
    assert blocks.tolist() == [[90, 0, 1, 2], [3, 4, 10, 11], [12, 13, 14, 15]]
    assert lengths.tolist() == [4, 4, 4] and left.tolist() == []
    blocks, _, left = pack([np.arange(6)], 4, separate=False)
    assert blocks.tolist() == [[0, 1, 2, 3]] and left.tolist() == [4, 5]


def test_separate_documents_never_share_a_block():
    blocks, lengths, left = pack([np.arange(1, 7), np.arange(1, 6), np.arange(1, 3)], 4, separate=True)
    # the second document's rest is one token, which has nothing to predict
    assert blocks.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [1, 2, 3, 4], [1, 2, 0, 0]]
    assert lengths.tolist() == [4, 2, 4, 2] and len(left) == 0


def test_several_documents_share_a_block_where_they_fit_best():
    documents = [np.arange(1, 7), np.arange(11, 16), np.arange(21, 23), np.arange(31, 34), np.arange(41, 43)]
    blocks, lengths, left = pack(documents, 6, separate=True, several=True)
    # 6, 5, 3, 2 and 2 tokens: two fill up three, and of the two of the same length the first
    assert blocks.tolist() == [
        [1, 2, 3, 4, 5, 6],
        [11, 12, 13, 14, 15, 0],
        [31, 32, 33, ~21, 22, 0],
        [41, 42, 0, 0, 0, 0],
    ]
    assert lengths.tolist() == [6, 5, 5, 2] and len(left) == 0
    random = np.random.default_rng(0).integers(2, 33, 500).tolist()
    bins = best_fit(random, 32)
    assert sorted(number for row in bins for number in row) == list(range(500))
    assert all(sum(random[number] for number in row) <= 32 for row in bins)
    assert len(bins) <= 11 / 9 * -(-sum(random) // 32) + 4  # the bound of best fit decreasing (Johnson et al. 1974)


def test_batches_say_where_packed_documents_begin(tokenizer):
    blocks, lengths, _ = pack([np.arange(31, 34), np.arange(21, 23)], 6, separate=True, several=True)
    batch = BatchMaker("causal", tokenizer, True, 0.15, seed=0)(blocks, lengths, 0)
    assert batch["input_ids"][0, :5].tolist() == [31, 32, 33, 21, 22]
    assert batch["labels"].tolist() == [[31, 32, 33, -100, 22, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]


def test_shuffled_blocks_visit_each_block_once_an_epoch_and_resume():
    blocks = np.arange(7)[:, None]
    source = ShuffledBlocks(blocks, np.ones(7), seed=3)
    epochs = np.concatenate([source.take(count)[0] for count in (3, 9, 2)]).reshape(2, 7)
    for epoch in epochs:
        assert sorted(epoch) == list(range(7))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert source.epoch == 2
    for position in range(14):
        resumed = ShuffledBlocks(blocks, np.ones(7), seed=3)
        resumed.load_state_dict({"position": position})
        assert resumed.take(14 - position)[0][:, 0].tolist() == epochs.reshape(-1)[position:].tolist()
    assert ShuffledBlocks(blocks, np.ones(7), seed=4).take(7)[0][:, 0].tolist() != epochs[0].tolist()


def blocks_by_hand(documents, block_size, several):
    """Blocks of documents kept apart, and their lengths, as `pack` describes them."""
    parts = [doc[i : i + block_size] for doc in documents for i in range(0, len(doc), block_size)]
    parts = [part for part in parts if len(part) > 1]
    rows = best_fit([len(part) for part in parts], block_size) if several else [[i] for i in range(len(parts))]
    blocks = []
    for row in rows:
        first, *rest = (parts[number].tolist() for number in row)
        tokens = [*first, *(token for part in rest for token in (~part[0], *part[1:]))]
        blocks.append(tokens + [0] * (block_size - len(tokens)))
    return blocks, [sum(len(parts[number]) for number in row) for row in rows]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("block_size", [3, 16, 1000])
def test_blocks_are_read_from_wherever_their_tokens_lie(documents, tokenizer, block_size, several):
    ids = [*encoded(documents, tokenizer), np.array([7]), np.arange(16), np.arange(17), np.arange(33), np.arange(0)]
    tokens, sizes = np.concatenate(ids).astype(np.int32), np.array(list(map(len, ids)))
    arrays = np.split(tokens, [1, 40, 40, 41, 90, 600])  # which end within documents, and one is empty
    expected, lengths = blocks_by_hand(ids, block_size, several)
    blocks = PlacedBlocks(arrays, sizes, block_size, True, several)
    assert blocks.tokens == len(tokens) and len(blocks) == len(expected)
    assert blocks[np.arange(len(blocks))].tolist() == expected and blocks.lengths.tolist() == lengths
    assert pack(ids, block_size, True, several=several)[0].tolist() == expected
    joined = PlacedBlocks(arrays, sizes, block_size, False)
    count = len(tokens) // block_size
    np.testing.assert_array_equal(joined[np.arange(count)], tokens[: count * block_size].reshape(count, block_size))
    assert len(joined) == count and (joined.lengths == block_size).all()


@pytest.fixture
def text_options(tmp_path, monkeypatch):
    """Options with two files of text, cached in a folder of their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, words in (("a", 3000), ("b", 200)):
        (tmp_path / f"{name}.txt").write_text(make_text(words, len(name)) + name)
    named = {"output_dir": "any", "tokenizer_name": "any", "model_type": "conv_lm", "block_size": 16}
    return lambda **more: PretrainOptions(
        train_file=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], **named, **more
    )


def test_text_is_tokenized_once_and_lies_in_a_file(text_options, tokenizer, tmp_path, monkeypatch):
    train, _ = pretrain_setup.load_documents(text_options())
    blocks = pretrain_setup.training_blocks(text_options(), train, tokenizer)
    assert pretrain_setup.encode(train, tokenizer).cache_files
    assert not any(array.flags.owndata for array in blocks.blocks.arrays)  # views of the file
    tokenizer.save_pretrained(tmp_path / "saved")
    again = corpus.load_tokenizer(str(tmp_path / "saved"))  # as a resumed run has it
    tokenize = corpus.tokenize
    monkeypatch.setattr(corpus, "tokenize", None)
    train, _ = pretrain_setup.load_documents(text_options())
    cached = pretrain_setup.training_blocks(text_options(), train, again)
    np.testing.assert_array_equal(cached.take(9)[0], blocks.take(9)[0])
    # another text, or another tokenizer, is another
    monkeypatch.setattr(corpus, "tokenize", tokenize)
    other = pretrain_setup.training_blocks(text_options(), train, corpus.train_tokenizer(["whale"], 259, masked=True))
    assert len(other) > len(blocks)
    (tmp_path / "a.txt").write_text(make_text(100, 5))
    train, _ = pretrain_setup.load_documents(text_options())
    assert len(pretrain_setup.training_blocks(text_options(), train, tokenizer)) < len(blocks) / 2


def test_documents_of_an_encoder_are_tokenized_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [make_text(words, words) for words in (1, 2, 9)]
    tokenizer = corpus.train_tokenizer(texts, 300, masked=True)
    whole = [tokenizer(text)["input_ids"] for text in [*texts, ""]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, None]))
    documents = corpus.load_files([str(tmp_path / "a.jsonl")], "train_file", "text", streaming=False)
    encoded = pretrain_setup.encode(documents, tokenizer, 5)
    assert encoded["ids"][:] == [ids[:5] for ids in whole if len(ids) > 1]
    assert len(whole[2]) > 5 and 1 <= len(encoded) < len(whole)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = corpus.load_tokenizer(str(tmp_path / "saved"))  # as a resumed run has it
    monkeypatch.setattr(type(again), "__call__", None)
    assert pretrain_setup.encode(documents, again, 5)["ids"][:] == encoded["ids"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("a", 200), ("b", 50)):
        rows = [{"text": f"{name} {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PretrainOptions(
        output_dir="any",
        tokenizer_name="any",
        model_type="conv_lm",
        train_file=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        train_weights=[3, 2],
        streaming=streaming,
        max_steps=5,
        validation_fraction=0 if streaming else 0.1,
    )
    train, held_out = pretrain_setup.load_documents(options)
    drawn = list(corpus.texts(train))
    assert sum(text.startswith("a") for text in drawn) / len(drawn) == pytest.approx(0.6, abs=0.07)
    everything = {f"{name} {i}" for name, count in (("a", 200), ("b", 50)) for i in range(count)}
    if streaming:
        assert set(drawn) == everything
    else:
        kept = set(corpus.texts(held_out))
        assert len(held_out) == len(kept) == 25 and kept.isdisjoint(drawn) and kept | set(drawn) == everything
    with pytest.raises(ScriptError, match="--train_weights has 3 numbers and --train_file 2 entries"):
        PretrainOptions(**{**vars(options), "train_weights": [1, 2, 3]})


@pytest.mark.parametrize("streaming", [False, True])
def test_text_of_several_columns_leaves_out_what_is_excluded(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {
        "pairs": [{"sentence1": "a whale", "sentence2": "a ship"}, {"sentence1": "The  End", "sentence2": "", "n": 1}],
        "reviews": [{"text": "a fine film", "label": 1}],
        "test": [{"sentence1": "the end", "label": 0}, {"sentence1": "a sail", "label": 0}],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    named = {"output_dir": "any", "tokenizer_name": "any", "model_type": "conv_lm", "max_steps": 1}
    options = {
        **named,
        "train_file": [str(tmp_path / "pairs.jsonl"), str(tmp_path / "reviews.jsonl")],
        "text_column": ["text", "sentence1", "sentence2"],
        "exclude_file": [str(tmp_path / "test.jsonl")],
        "streaming": streaming,
        "validation_fraction": 0,
    }
    train, _ = pretrain_setup.load_documents(PretrainOptions(**options))
    assert sorted(filter(None, corpus.texts(train))) == ["a fine film", "a ship", "a whale"]
    if not streaming:  # a later start finds what was tokenized by this name
        again, _ = pretrain_setup.load_documents(PretrainOptions(**options))
        assert again._fingerprint == train._fingerprint
    for bad, message in (
        ({"text_column": ["body", "words"]}, "has no column 'body or words', only sentence1"),
        ({"exclude_file": options["train_file"]}, "every document to train on is in --exclude_file: give other text"),
        ({"exclude_file": ["nowhere.jsonl"]}, "--exclude_file nowhere.jsonl: no such file"),
    ):
        with pytest.raises(ScriptError, match=message):
            pretrain_setup.load_documents(PretrainOptions(**{**options, "streaming": False, **bad}))


def test_rows_are_joined_to_one_document_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, some in (("a", ["= Whale =\n", "", "It swims"]), ("b", ["= Ship =\n", "= Whale =\n"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in some))
    named = {"output_dir": "any", "tokenizer_name": "any", "model_type": "conv_lm"}
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    options = {**named, "train_file": files, "validation_file": files, "join_rows": True}
    train, held_out = pretrain_setup.load_documents(PretrainOptions(**options))
    assert list(corpus.texts(train)) == ["= Whale =\nIt swims\n", "= Ship =\n= Whale =\n"]
    assert list(corpus.texts(held_out)) == ["= Whale =\nIt swims\n= Ship =\n= Whale =\n"]
    with pytest.raises(ScriptError, match="--join_rows reads whole files, and --streaming none: leave one"):
        PretrainOptions(**options, streaming=True, max_steps=1)


@pytest.fixture(params=["text", "jsonl", "parquet"])
def make_stream(request, documents, tmp_path, monkeypatch):
    """Opens a stream of the documents, which lie in two files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for half in range(2):
        rows = [{"body": text} for text in documents[4 * half : 4 * half + 4]]
        if request.param == "text":
            for i, row in enumerate(rows):
                (tmp_path / f"{half}{i}.text").write_text(row["body"], encoding="utf-8", newline="")
        elif request.param == "jsonl":
            (tmp_path / f"{half}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{half}.parquet")
    return lambda: corpus.load_files([str(tmp_path / f"*.{request.param}")], "train_file", "body", streaming=True)


@pytest.mark.parametrize("separate", [False, True])
def test_streams_resume_with_the_very_next_block(make_stream, tokenizer, documents, monkeypatch, separate):
    monkeypatch.setattr(corpus, "GROUP_CHARACTERS", 700)

    def source():
        return StreamedBlocks(make_stream(), tokenizer, 16, separate, seed=5)

    whole = source()
    memory, _, _ = pack(encoded(documents, tokenizer), 16, separate)
    count = len(memory)
    states, taken = [], []
    while whole.passes < 2:
        taken.append(whole.take(3)[0])
        states.append(json.loads(json.dumps(whole.state_dict())))
    taken = np.concatenate(taken)
    assert len(taken) > count
    # one pass holds what the documents hold in memory, in another order
    assert sorted(taken[:count].tolist()) == sorted(memory.tolist())
    assert taken[:count].tolist() != memory.tolist()
    for i in range(0, len(states), 5):
        resumed = source()
        resumed.load_state_dict(states[i])
        assert resumed.position == 3 * (i + 1)
        rest = taken[resumed.position :]
        if len(rest):
            np.testing.assert_array_equal(resumed.take(len(rest))[0], rest)


def test_a_stream_without_a_block_is_an_error(tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "short"}, {"text": None}]))
    with pytest.raises(ScriptError, match="less text than one block of 512"):
        StreamedBlocks(stream, tokenizer, 512, False, seed=0).take(1)


def test_causal_batches_ignore_padding(tokenizer):
    make = BatchMaker("causal", tokenizer, separate=True, mlm_probability=0.15, seed=0)
    batch = make(np.array([[5, 6, 7, 0], [8, 9, 10, 11]], dtype=np.int32), np.array([3, 4]), first=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, tokenizer.pad_token_id], [8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[5, 6, 7, IGNORED], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert make.targets(batch) == 2 + 3


def test_masked_batches_follow_the_recipe_and_do_not_depend_on_the_batch(tokenizer):
    make = BatchMaker("masked", tokenizer, separate=True, mlm_probability=0.15, seed=0)
    blocks = np.random.default_rng(0).integers(3, 300, size=(400, 64), dtype=np.int32)
    blocks[:, 10] = tokenizer.eos_token_id
    lengths = np.full(400, 60)
    batch = make(blocks, lengths, first=0)
    chosen = batch["labels"] != IGNORED
    original = torch.from_numpy(blocks.astype(np.int64))
    assert make.targets(batch) == int(chosen.sum())
    assert not chosen[:, 10].any() and not chosen[:, 60:].any()
    assert (batch["labels"][chosen] == original[chosen]).all()
    assert float(chosen.sum()) / (400 * 59) == pytest.approx(0.15, abs=0.01)
    inputs = batch["input_ids"]
    unchosen = ~chosen
    unchosen[:, 60:] = False
    assert (inputs[unchosen] == original[unchosen]).all()
    masked = (inputs[chosen] == tokenizer.mask_token_id).float().mean()
    kept = (inputs[chosen] == original[chosen]).float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.03)
    assert float(kept) == pytest.approx(0.1, abs=0.03)
    part = make(blocks[100:103], lengths[100:103], first=100)
    for name in batch:
        assert torch.equal(part[name], batch[name][100:103])
    assert not torch.equal(make(blocks[:3], lengths[:3], first=400)["labels"], batch["labels"][:3])


def test_every_masked_block_has_a_target(tokenizer):
    make = BatchMaker("masked", tokenizer, separate=True, mlm_probability=0.15, seed=0)
    batch = make(np.tile(np.array([[5, tokenizer.eos_token_id]], dtype=np.int32), (50, 1)), np.full(50, 2), first=0)
    assert ((batch["labels"] != IGNORED).sum(1) == 1).all()


def test_hold_out_whole_documents_or_their_ends():
    many = [f"document {i}" for i in range(100)]
    train, held_out = (list(part["text"]) for part in corpus.hold_out(as_data(many), 0.1, seed=0))
    assert len(held_out) == 10 and sorted(train + held_out) == sorted(many)
    assert held_out != many[-10:]
    text = "".join(f"line {i}\n" for i in range(1000))
    (train,), (held_out,) = (part["text"] for part in corpus.hold_out(as_data([text]), 0.1, seed=0))
    assert train + held_out == text and held_out.startswith("line")
    assert len(held_out) == pytest.approx(0.1 * len(text), rel=0.05)


def test_files_of_every_kind_load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"id": 1, "body": "one é"}, {"id": 2, "body": None}, {"id": 3, "body": "three"}]
    (tmp_path / "a.txt").write_text("\ufeffone é", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two\r\nlines")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")

    def load(pattern):
        return list(corpus.texts(corpus.load_files([str(tmp_path / pattern)], "train_file", "body", streaming=False)))

    assert load("*.txt") == ["one é", "two\nlines"]
    for name in ("c.jsonl", "d.jsonl.gz", "e.parquet"):
        assert load(name) == ["one é", "three"]
    (tmp_path / "f.csv").write_text('id,body\n1,"one, é"\n2,\n3,null\n')
    (tmp_path / "g.tsv").write_text('id\tbody\n1\ta "bare quote\n')
    assert load("f.csv") == ["one, é", "null"] and load("g.tsv") == ['a "bare quote']
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).rename(tmp_path / "folder" / name)
    (tmp_path / "folder" / ".hidden").write_bytes(b"\0")
    assert load("folder") == ["one é", "two\nlines"]


def test_unusable_files_are_errors_that_name_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "zero.txt").write_bytes(b"text\0more")
    (tmp_path / "broken.jsonl").write_text("{nonsense\n")
    (tmp_path / "fine.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "null.jsonl").write_text('{"body": ""}\n{"body": null}\n')
    (tmp_path / "nulls.jsonl").write_text('{"body": null}\n')
    (tmp_path / "number.jsonl").write_text('{"body": 7}\n')
    (tmp_path / "list.jsonl").write_text('{"body": ["a", "b"]}\n')
    (tmp_path / "both.jsonl").write_text('{"body": "a"}\n{"body": 7}\n')

    def load(*names, streaming=False):
        return corpus.load_files([str(tmp_path / name) for name in names], "train_file", "body", streaming)

    for name, message in {
        "none*.txt": "none.*no such file",
        "empty.txt": "empty.txt is empty",
        "latin.txt": "latin.txt is not UTF-8 text .byte 0",
        "zero.txt": "zero.txt is binary.*character 4",
        "broken.jsonl": "broken.jsonl cannot be loaded",
        "null.jsonl": "null.jsonl holds no text in its column 'body'",
        "nulls.jsonl": "nulls.jsonl holds no text in its column 'body'",
        "number.jsonl": "number.jsonl: its column 'body' holds int64, not text; name one by --text_column",
        "list.jsonl": "list.jsonl: its column 'body' holds list, not text; name one by --text_column",
        "both.jsonl": "both.jsonl(: its column 'body' holds json, not text| cannot be loaded)",
        "fine.jsonl": "no column 'body', only text; name one by --text_column",
    }.items():
        with pytest.raises(ScriptError, match=message):
            load(name)
    with pytest.raises(ScriptError, match="no column 'body'"):
        load("fine.jsonl", streaming=True)
    for name in ("number", "list"):
        with pytest.raises(ScriptError, match="document 0 is .*, not a text; name a column of texts by --text_column"):
            list(corpus.texts(load(f"{name}.jsonl", streaming=True)))
    with pytest.raises(ScriptError, match="mixes jsonl and txt files"):
        load("fine.jsonl", "zero.txt")
    (tmp_path / "table.csv").write_text("name,price\nrope,7\n")
    with pytest.raises(ScriptError, match="table.csv has no column 'body', only name, price; name one by"):
        load("table.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ScriptError, match="--train_file .*folder: the folder holds no files"):
        load("folder")
