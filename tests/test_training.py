"""Model, loss, optimizer state, held-out loss and record, each against what it must equal."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, LlamaConfig, MixtralConfig, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss

from smolpretrain.arguments import PretrainArguments
from smolpretrain.core import files
from smolpretrain.core.architectures import load_config
from smolpretrain.data.collator import PackedCollator
from smolpretrain.data.tokens.tokenization import train_tokenizer
from smolpretrain.hub import run_record
from smolpretrain.space import static
from smolpretrain.training import attention, compiling, held_out, loss, model, record
from smolpretrain.training.trainer import PretrainTrainer

EOS = 0
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def tiny(seed=0, attention="sdpa", **changes):
    return model.random_model(LlamaConfig(**{**TINY, **changes}), seed, attention)


def rows(count, length=64, seed=0):
    ids = np.random.default_rng(seed).integers(1, TINY["vocab_size"], (count, length))
    ids[np.random.default_rng(seed + 1).random(ids.shape) < 0.1] = EOS
    return [{"input_ids": row} for row in ids]


# The model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384)],
)
def test_built_in_models_have_the_released_sizes(name, parameters):
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(load_config(name))
    assert sum(p.numel() for p in built.parameters()) == parameters  # as huggingface.co counts HuggingFaceTB's


def test_built_in_models_have_the_authors_pre_training_values():
    config = load_config("smollm2-1.7b")
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (2048, 10000.0)
    assert (config.vocab_size, config.rms_norm_eps, config.tie_word_embeddings) == (49152, 1e-5, True)


def test_weights_are_random_seeded_and_float32_even_from_a_trained_directory(tmp_path):
    trained = tiny(seed=1)
    trained.to(torch.bfloat16).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    first, again, other = (model.random_model(config, seed, "sdpa") for seed in (5, 5, 6))
    head = [m.lm_head.weight for m in (first, again, other, trained)]
    assert head[0].dtype == torch.float32
    assert torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2]) and not torch.equal(head[0].bfloat16(), head[3])


def test_config_overrides_change_fields_and_an_unknown_one_is_refused():
    assert load_config("smollm2-135m", {"num_hidden_layers": 3}).num_hidden_layers == 3
    with pytest.raises(ValueError, match="config_overrides: layers is not a field of LlamaConfig"):
        load_config("smollm2-135m", {"layers": 3})
    with pytest.raises(ValueError, match="config_overrides = .*make no LlamaConfig"):
        load_config("smollm2-135m", {"num_hidden_layers": "three"})


def test_what_is_derived_follows_an_override(tmp_path):
    load_config("smollm2-135m").save_pretrained(tmp_path)
    for name in ("smollm2-135m", str(tmp_path)):
        config = load_config(name, {"hidden_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6})
        assert config.head_dim == 128 and config.rope_parameters["rope_theta"] == 10000.0


def test_a_model_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ValueError, match="smollm2-9b is not a directory, a Hub id .* smollm2-135m, "):
        load_config("smollm2-9b")
    with pytest.raises(ValueError, match="is a directory without config.json"):
        load_config(str(tmp_path))
    with pytest.raises(ValueError, match="nobody/nothing cannot be had from the Hub"):
        load_config("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="is a vit, which is not a causal language model"):
        load_config(str(tmp_path))


def test_vocabulary_and_block_must_fit_the_model():
    tokenizer = train_tokenizer(["some text to train on, long enough"] * 3, 300)
    config = LlamaConfig(**TINY | {"vocab_size": 200})
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(tokenizer)} tokens, the model 200"):
        model.fit_config(config, tokenizer, 64)
    config = LlamaConfig(**TINY)
    with pytest.raises(ValueError, match="block_size = 129 is more than the model's 128 positions"):
        model.fit_config(config, tokenizer, 129)
    model.fit_config(config, tokenizer, 128)
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    embeddings = model.random_model(config, 0, "sdpa").model.embed_tokens
    assert embeddings.padding_idx is None and embeddings.weight[0].norm() > 0.1  # EOS is learned like any other


def test_a_model_without_sdpa_gets_eager_and_is_refused_sdpa():
    cpu, config = torch.device("cpu"), BloomConfig()
    assert attention.choose("auto", cpu, config)[0] == "eager"
    with pytest.raises(ValueError, match="attn_implementation = sdpa cannot be had: BloomForCausalLM does not have it"):
        attention.choose("sdpa", cpu, config)


def test_a_model_that_ignores_positions_is_refused_intra_document_masking():
    config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="BloomForCausalLM lets attention run across documents"):
        model.check_masking(model.random_model(config, 0, "eager"))
    for name in ("eager", "sdpa"):
        model.check_masking(tiny(attention=name))


def test_the_probes_before_training_do_not_run_flash_attention_on_a_cpu(monkeypatch):
    network = tiny()

    def kernel(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports fp16 and bf16, on CUDA")

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", kernel)
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        network(input_ids=torch.arange(8)[None], use_cache=False)  # what the probes would meet
    model.check_masking(network)
    assert loss.install_chunked_loss(network, 16) is None
    assert network.config._attn_implementation == "flash_attention_2"


# The loss


@pytest.fixture(params=["in place", "as compiled", pytest.param("compiled", marks=pytest.mark.slow)])
def compiled(request, monkeypatch):
    """Whether the inside of a chunk is the one that is compiled on CUDA; compiled in earnest in the slow tests."""
    if request.param == "as compiled":
        monkeypatch.setattr(loss, "_compiled_chunk", lambda: loss._chunk_out_of_place)
    return request.param != "in place"


@pytest.mark.parametrize("items", [None, 777])
@pytest.mark.parametrize("chunk", [1, 50, 4096])
def test_the_loss_in_chunks_and_its_gradients_equal_the_models_own(items, chunk, compiled):
    items = None if items is None else torch.tensor(items)
    batch = PackedCollator(EOS)(rows(3))
    found = []
    for chunk_tokens in (0, chunk):
        network = tiny()
        if chunk_tokens:
            assert loss.install_chunked_loss(network, chunk_tokens, compiled=compiled) is None
        out = network(**batch, num_items_in_batch=items, use_cache=False)
        out.loss.backward()
        found.append((out.loss.item(), torch.cat([p.grad.flatten() for p in network.parameters()])))
    (own, own_gradient), (chunked, chunked_gradient) = found
    assert chunked == pytest.approx(own, rel=1e-5)
    assert (chunked_gradient - own_gradient).norm() / own_gradient.norm() < 1e-5


@pytest.mark.parametrize("chunk", [50, 4096])
def test_the_z_loss_is_in_the_gradient_and_its_own_row_and_not_in_the_loss(chunk, compiled):
    coefficient, noted = 0.1, []
    hidden, weight = torch.randn(2, 64, 32), torch.randn(512, 32)
    labels = torch.where(torch.rand(2, 64) < 0.2, -100, torch.randint(512, (2, 64)))
    found, expected = ([h.clone().requires_grad_() for h in (hidden, weight)] for _ in range(2))
    note = lambda name, z: noted.append((name, z.item()))  # noqa: E731
    value = loss.linear_cross_entropy(*found, labels, chunk, 100, z_loss=coefficient, note=note, compiled=compiled)
    (3 * value).backward()  # as Trainer multiplies by the ranks
    logits = (expected[0] @ expected[1].T)[:, :-1]
    cross_entropy = ForCausalLMLoss(expected[0] @ expected[1].T, labels, 512, num_items_in_batch=100)
    squares = torch.logsumexp(logits, -1).square()[labels[:, 1:] != -100].sum()
    (3 * (cross_entropy + coefficient * squares / 100)).backward()
    assert value.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert noted == [("z_loss", pytest.approx(coefficient * squares.item() / 100, rel=1e-5))]
    for mine, own in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, own.grad, rtol=1e-4, atol=1e-5)


def test_a_chunk_takes_a_fortieth_of_a_gpus_memory_and_what_it_did_elsewhere():
    assert [loss.default_chunk(49152, gib * 2**30) for gib in (16, 24, 80)] == [2048, 2048, 8192]
    assert loss.default_chunk(49152) == 682 and loss.default_chunk(10**9, 2**30) == 1


def test_under_autocast_the_residual_stream_is_in_its_dtype_and_without_it_in_float32():
    network, seen = tiny(), []
    network.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for cast in (False, True):
        if cast:
            compiling.half_stream(network)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                network(torch.arange(8)[None], use_cache=False)
    assert seen == [torch.float32] * 3 + [torch.bfloat16]


def test_the_loss_in_chunks_never_builds_the_full_logits():
    hidden, weight = torch.randn(1, 400, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels, largest = torch.randint(0, 1000, (1, 400)), [0]

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    with Largest():
        loss.linear_cross_entropy(hidden, weight, labels, chunk_tokens=20).backward()
    assert largest[0] == 20 * 1000
    with Largest():
        ForCausalLMLoss(torch.nn.functional.linear(hidden, weight), labels, 1000).backward()
    assert largest[0] == 400 * 1000  # what the guard above would see


def test_without_gradients_the_loss_makes_none():
    hidden, weight = torch.randn(1, 40, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    made = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "zeros_like" in str(func):
                made.append(tuple(out.shape))
            return out

    labels = torch.randint(0, 1000, (1, 40))
    with Made(), torch.no_grad():
        loss.linear_cross_entropy(hidden, weight, labels, 20)
    assert (1000, 8) not in made
    with Made():
        loss.linear_cross_entropy(hidden, weight, labels, 20)
    assert (1000, 8) in made  # what the guard above would see


def test_the_loss_under_autocast_equals_the_models_own_to_bfloat16():
    batch = PackedCollator(EOS)(rows(2))
    plain, chunked = tiny(), tiny()
    loss.install_chunked_loss(chunked, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert chunked(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=1e-3)


def test_generation_after_the_loss_is_installed_is_unchanged():
    plain, chunked = tiny(), tiny()
    loss.install_chunked_loss(chunked, 16)
    chunked(**PackedCollator(EOS)(rows(1)))
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(plain(input_ids=ids).logits, chunked(input_ids=ids).logits)
    assert chunked(input_ids=ids, labels=ids).logits is None  # hidden states never pass for logits


def test_a_model_whose_logits_are_scaled_keeps_its_own_loss():
    config = Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.5)
    network = model.random_model(config, 0, "eager")
    before = network(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    assert "its own" in loss.install_chunked_loss(network, 16)
    assert torch.equal(before, network(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss_in_chunks():
    config = MixtralConfig(**TINY, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    batch = PackedCollator(EOS)(rows(2))
    plain, chunked = (model.random_model(config, 0, "sdpa") for _ in range(2))
    assert loss.install_chunked_loss(chunked, 16) is None
    assert chunked(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=1e-5)


# The Trainer


def trainer(tmp_path, eval_rows=(), **options):
    set_seed(0)
    words = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 2, "warmup_steps": 1, "bf16": False}
    args = PretrainArguments(output_dir=str(tmp_path), deepspeed=None, disable_tqdm=True, **words | options)
    network = tiny()
    return PretrainTrainer(
        model=network,
        args=args,
        train_dataset=rows(16),
        eval_dataset=list(eval_rows),
        data_collator=PackedCollator(EOS),
    )


def test_embeddings_and_norms_have_32_bit_state_matrices_8_bit_and_norms_no_decay(tmp_path):
    made = trainer(tmp_path)
    made.train()
    optimizer = made.optimizer.optimizer
    named = {id(p): name for name, p in made.model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = "norm" if "norm" in named[id(p)] else "embedding" if "embed" in named[id(p)] else "matrix"
            bits = optimizer.state[p]["state1"].element_size() * 8
            if p.numel() >= 4096 or kind != "matrix":  # bitsandbytes leaves smaller tensors in 32 bits
                seen.setdefault(kind, set()).add((bits, group["weight_decay"]))
    assert seen == {"matrix": {(8, 0.1)}, "embedding": {(32, 0.1)}, "norm": {(32, 0.0)}}


def test_the_z_loss_is_the_same_whatever_the_accumulation(tmp_path):
    ended, logged = [], []
    for micro, accumulation in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path, logging_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
            optim="sgd", train_sampling_strategy="sequential", max_grad_norm=1e9, learning_rate=1.0, warmup_steps=0,
        )  # fmt: skip
        loss.install_chunked_loss(made.model, 100, z_loss=1e-2)
        made.terms = made.model.terms
        made.train()
        logged.append([(row["loss"], row["z_loss"]) for row in made.state.log_history if "loss" in row])
        ended.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert torch.allclose(*ended, rtol=1e-4, atol=1e-5)
    assert np.allclose(*logged, rtol=1e-5) and all(z > 0.1 for _, z in logged[0])  # 0.01 x ln(512) squared is 0.39


def test_held_out_loss_is_weighted_by_tokens_not_by_batches(tmp_path):
    few, many = np.full(64, EOS), rows(1)[0]["input_ids"]
    few[40:] = many[40:]  # most of this row are one-token documents: few targets
    made = trainer(tmp_path, [{"input_ids": few}, {"input_ids": many}], per_device_eval_batch_size=1)
    metrics = made.evaluate()
    sums = np.zeros(2)
    for row in made.eval_dataset:
        batch = made.data_collator([row])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        sums += np.array([made.model(**batch, use_cache=False).loss.item() * targets, targets])
    assert metrics["eval_tokens"] == sums[1]
    assert metrics["eval_loss"] == pytest.approx(sums[0] / sums[1], rel=1e-6)
    means = np.mean([made.model(**made.data_collator([row]), use_cache=False).loss.item() for row in made.eval_dataset])
    assert abs(metrics["eval_loss"] - means) > 1e-3  # what Trainer's own would have said


def test_eos_is_a_target_of_training(tmp_path):
    made = trainer(tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    assert "attention_mask" not in batch
    assert (batch["labels"][:, 1:] == EOS).any()


def test_the_keys_of_flash_attention_pass_through_the_real_trainer_and_change_nothing_under_sdpa(tmp_path):
    losses = []
    for cu_seq_lens in (False, True):
        made = trainer(tmp_path, logging_steps=1)
        made.data_collator = PackedCollator(EOS, cu_seq_lens=cu_seq_lens)
        seen, forward = [], made.model.forward
        made.model.forward = lambda *args, seen=seen, forward=forward, **kw: (
            seen.append(set(kw)) or forward(*args, **kw)
        )
        made.train()
        assert all(("cu_seq_lens_q" in keys) == ("max_length_k" in keys) == cu_seq_lens for keys in seen)
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_the_export_is_tied_once_readable_by_all_and_uses_its_cache(tmp_path):
    made = trainer(tmp_path, bf16=True)
    made.processing_class = train_tokenizer(["some text to train on, long enough"] * 3, 300)
    made.train()
    made.export()
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True and "_name_or_path" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, made.model.lm_head.weight)


# The record


def test_run_json_grows_entry_by_entry_and_is_never_half_written(tmp_path):
    record.write_run(tmp_path, arguments={"seed": 1})
    record.write_run(tmp_path, result={"bits_per_byte": 2.0})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "arguments": {"seed": 1},
        "result": {"bits_per_byte": 2.0},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_versions_of_what_is_not_installed_are_none(monkeypatch):
    monkeypatch.setattr(record, "_RECORDED", ("torch", "not-there"))
    assert record.versions()["not-there"] is None and record.versions()["torch"]


@pytest.mark.parametrize(
    ("first", "verdict"), [(math.log(512) + 0.3, "as random weights"), (2.0, "more than 1 nat away")]
)
def test_the_first_loss_is_held_against_ln_vocabulary(tmp_path, capsys, first, verdict):
    log = record.Record(tmp_path, None, torch.device("cpu"))
    log._hold_first_loss(first, 512)
    assert verdict in capsys.readouterr().out and verdict in (tmp_path / "training_log.md").read_text()


@pytest.mark.parametrize("evaluated_again", [False, True])
def test_a_resumed_run_writes_later_metrics_and_samples_again(tmp_path, evaluated_again):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)))
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 4, "eval_loss": 3.0}\n{"step": 4, "lo')  # the last line was cut short by a kill
    record.Record(tmp_path, None, torch.device("cpu"))._keep_until(4, evaluated_again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 2}, {"step": 4}, *([] if evaluated_again else [{"step": 4, "eval_loss": 3.0}])]
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [2, 4]


def test_a_sample_with_a_line_separator_in_it_is_one_row_for_a_resumed_run_and_its_readers(tmp_path):
    row = {"step": 2, "text": "one\u2028two\x85three"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    record.Record(tmp_path, None, torch.device("cpu"))._keep_until(4, evaluated_again=False)
    for read in (lambda path: files.read_rows(path).rows, run_record.read_rows, static.read_rows):
        assert read(tmp_path / "samples.jsonl") == [row]


def test_a_log_line_is_of_the_steps_since_the_last_and_mfu_is_absent_where_a_peak_is_unknown(tmp_path):
    log = record.Record(tmp_path, None, torch.device("cpu"), flops_per_token=6e6, peak_flops=1e9)
    log.tokens_trained, log.training_seconds = 1000, 10.0
    first = log.measure(data_wait_seconds=1.0)
    assert (first["tokens_per_second"], first["mfu"], first["data_wait_share"]) == (100.0, 0.6, 0.1)
    log.tokens_trained, log.training_seconds = 1600, 12.0
    assert (second := log.measure(data_wait_seconds=2.0))["tokens_per_second"] == 300.0
    assert second["data_wait_share"] == 0.5 and log.measured["peak_memory_gib_by_rank"] == [second["peak_memory_gib"]]
    unknown = record.Record(tmp_path, None, torch.device("cpu"), flops_per_token=6e6)
    assert "mfu" not in unknown.measure(0.0) and unknown.measured["mfu"] is None


def test_bytes_of_tokens_are_trusted_only_where_they_add_up_to_the_text():
    texts = ["Caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600 <|endoftext|>", "plain words, CAPITALS and 2024"]
    tokenizer = train_tokenizer(texts * 3, 300)
    sizes = held_out.bytes_per_token(tokenizer, texts)
    assert sizes[EOS] == 0 and len(sizes) == len(tokenizer)
    for text in texts:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert sizes[ids].sum() == len(text.encode())
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert held_out.bytes_per_token(tokenizer, texts) is None
    assert held_out.bytes_per_token(tokenizer, []) is None
