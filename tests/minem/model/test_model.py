"""What training needs of the model: attention inside packed sequences, and layers that are recomputed."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.distributed.fsdp import fully_shard

import minem.model.decoder
from minem.model.decoder import Model, PackedAttention, varlen_attention
from minem.model.hf_config import ModelConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = [7, 3, 3, 1, 12]


def heads(lengths, *, starts=(), groups=(4, 2), channels=8, dtype=torch.float64, device="cpu", seed=0):
    """Random q, k, v of packed sequences, and a gradient for what comes out."""
    noise = torch.Generator().manual_seed(seed)
    n, m, (h, k) = sum(lengths), sum(lengths) + sum(starts), groups
    shapes = (n, h), (m, k), (m, k), (n, h)
    made = [torch.randn(*shape, channels, generator=noise, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_(i < 3) for i, x in enumerate(made)]


def defined(q, k, v, lengths, starts=None):
    """softmax(q k' / sqrt(C)) v under a mask of all N x M pairs: same sequence, and no later than the query."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    spans = [range(start, start + n) for start, n in zip(starts or [0] * len(lengths), lengths, strict=True)]
    query = torch.tensor([(i, place) for i, span in enumerate(spans) for place in span])[:, None]
    key = torch.tensor([(i, place) for i, span in enumerate(spans) for place in range(span.stop)])[None]
    mask = ((query[..., 0] == key[..., 0]) & (key[..., 1] <= query[..., 1])).to(q.device)
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def outputs_and_gradients(attention, q, k, v, grad):
    out = attention(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


# ------------------------------------------------------------------------------------------------ attention


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 1, 33])), min_size=1, max_size=8),
    st.sampled_from([(4, 2), (3, 1), (2, 2)]),
)
def test_packed_attention_and_its_gradients_equal_the_definition(sequences, groups):
    lengths, starts = zip(*sequences, strict=True)
    q, k, v, grad = heads(lengths, starts=starts, groups=groups)
    attention = PackedAttention(lengths, "cpu", starts)
    got = outputs_and_gradients(lambda *qkv: attention.packed(*qkv), q, k, v, grad)
    expected = outputs_and_gradients(lambda *qkv: defined(*qkv, lengths, starts), q, k, v, grad)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6))
def test_a_sequence_is_attended_to_the_bit_as_if_alone(lengths):
    q, k, v, _ = heads(lengths, dtype=torch.float32)
    together = PackedAttention(lengths, "cpu").packed(q, k, v).split(lengths)
    each = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    for length, one, qkv in zip(lengths, together, each, strict=True):
        assert torch.equal(one, PackedAttention([length], "cpu").packed(*qkv))


def fake_varlen(seen):
    """The kernel by its definition, with its checks of the arguments."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size):
        assert window_size == (-1, 0)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        for x, longest, starts in ((query, max_q, cu_seq_q), (key, max_k, cu_seq_k)):
            assert longest == starts.diff().max()
            assert starts[0] == 0
            assert starts[-1] == len(x)
        seen.append(cu_seq_q)
        lengths = cu_seq_q.diff()
        return defined(query, key, value, lengths.tolist(), (cu_seq_k.diff() - lengths).tolist())

    return attend


def like_2_11(seen):
    attend = fake_varlen(seen)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    return varlen_attn


def like_2_13(seen):
    attend = fake_varlen(seen)

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, num_splits=None
    ):
        if not enable_gqa and query.size(1) != key.size(1):
            raise ValueError("Expect query and key/value to have the same number of heads")
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    return varlen_attn


@pytest.fixture
def fresh():
    """PyTorch's kernel is looked up once per process: clear that cache before and after a test."""
    varlen_attention.cache_clear()
    yield
    varlen_attention.cache_clear()


@pytest.mark.parametrize("starts", [[0, 0, 0, 0, 0], [0, 5, 5, 2, 9]])
@pytest.mark.parametrize(("version", "groups"), [(like_2_11, (4, 2)), (like_2_13, (4, 2)), (like_2_13, (2, 2))])
def test_both_signatures_of_varlen_attention_get_their_arguments(fresh, monkeypatch, version, groups, starts):
    import torch.nn.attention.varlen

    seen = []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", version(seen))
    monkeypatch.setattr(minem.model.decoder, "takes_varlen", lambda q: True)
    q, k, v, grad = heads(LENGTHS, starts=starts, groups=groups)
    attention = PackedAttention(LENGTHS, "cpu", starts)
    got = outputs_and_gradients(lambda *qkv: attention.packed(*qkv), q, k, v, grad)
    attention.packed(q, k, v)
    assert len(seen) == 2
    assert seen[0] is seen[1]  # uploaded once, not once a layer
    monkeypatch.undo()
    expected = outputs_and_gradients(lambda *qkv: PackedAttention(LENGTHS, "cpu", starts).packed(*qkv), q, k, v, grad)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_installed_varlen_attention_takes_the_names_that_are_used(fresh):
    call = varlen_attention()
    inspect.signature(call.func).bind(*range(7), **call.keywords)


def test_without_the_kernel_the_exact_path_is_taken(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 1, 64), device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for built in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda built=built: built)
        assert minem.model.decoder.takes_varlen(on_gpu) == built
    q, k, v, _ = heads(LENGTHS)
    assert not minem.model.decoder.takes_varlen(q)
    torch.testing.assert_close(PackedAttention(LENGTHS, "cpu").packed(q, k, v), defined(q, k, v, LENGTHS))


@pytest.mark.gpu
def test_grouped_attention_in_float32_never_holds_all_scores():
    q, k, v, _ = heads([4096], groups=(16, 2), channels=64, dtype=torch.float32, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PackedAttention([4096], "cuda").packed(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 16 * 4096 * 4096 * 4 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [(16, 2), (14, 2), (8, 8)])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts", [[0] * 6, [0, 300, 40, 41, 129, 1000]])
def test_the_flash_kernel_against_the_exact_path(groups, channels, dtype, starts):
    """Against the definition in float64: the error is at most twice that of a padded rectangle."""
    lengths = [300, 1, 77, 77, 1024, 5]
    q, k, v, grad = heads(lengths, starts=starts, groups=groups, channels=channels, dtype=dtype, device="cuda")
    attention = PackedAttention(lengths, "cuda", starts)
    assert minem.model.decoder.takes_varlen(q)
    got = outputs_and_gradients(lambda *qkv: attention.packed(*qkv), q, k, v, grad)

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert not minem.model.decoder.takes_varlen(exact[0])
    expected = outputs_and_gradients(lambda *qkv: defined(*qkv, lengths, starts), *exact, grad.double())
    ours = outputs_and_gradients(lambda *qkv: attention.packed(*qkv), *exact, grad.double())
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def rectangles(q, k, v):
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        each = zip(q.split(lengths), k.split(ends), v.split(ends), strict=True)
        return torch.cat([PackedAttention._rectangle(*(x[None] for x in qkv))[0] for qkv in each])

    usual = outputs_and_gradients(rectangles, q, k, v, grad)
    for one, other, reference in zip(got, usual, expected, strict=True):
        assert (one - reference).norm() <= 2 * (other - reference).norm() + 1e-6 * reference.norm()


# ------------------------------------------------------------------------------------------------ recomputed layers


def random_model(**changes):
    torch.manual_seed(0)
    model = Model(ModelConfig.from_dict({**CONFIG, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def batch(lengths, vocabulary=64):
    noise = torch.Generator().manual_seed(1)
    n = sum(lengths)
    return {
        "input_ids": torch.randint(vocabulary, (n,), generator=noise),
        "lengths": lengths,
        "rows": torch.arange(0, n, 2),
        "targets": torch.randint(vocabulary, (len(range(0, n, 2)),), generator=noise),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_checkpointing_changes_no_bit_of_loss_or_gradients(kind):
    results = []
    for checkpointed in (0, 1, 3):
        model = random_model(model_type=kind, head_dim=8)
        model.checkpointed = checkpointed
        loss, logprobs, _ = model(**batch(LENGTHS))
        loss.backward()
        results.append([loss.detach(), logprobs, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def kept_bytes(model, lengths):
    """Bytes that a forward pass keeps for the backward pass, weights apart; storages that are kept twice count once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _, _ = model(**batch(lengths))
    loss.backward()
    return sum(size for address, (_, size) in kept.items() if address not in weights)


def test_checkpointed_layers_keep_two_rows_a_token():
    lengths = [64, 32, 32]
    kept = []
    for checkpointed in range(4):
        model = random_model()
        model.checkpointed = checkpointed
        kept.append(kept_bytes(model, lengths))
    rows = sum(lengths) * CONFIG["hidden_size"] * 4
    saved = [more - less for more, less in pairwise(kept)]
    assert min(saved) > 8 * rows  # each layer keeps much more than it then does
    # Of three layers stay five inputs (the first has no residual); the rest is what follows them, and cos and sin.
    tail = kept[3] - 5 * rows
    model = random_model(num_hidden_layers=1)
    model.checkpointed = 1
    assert kept_bytes(model, lengths) - rows == tail


def test_nothing_is_checkpointed_without_gradients(monkeypatch):
    """The generator and the scoring of samples do not pay for it."""
    calls = []
    monkeypatch.setattr(
        minem.model.decoder, "checkpoint", lambda layer, *inputs, **_: (calls.append(1), layer(*inputs))[1]
    )
    model = random_model()
    model.checkpointed = 2
    with torch.no_grad():
        model(**batch(LENGTHS))
    assert calls == []
    model(**batch(LENGTHS))
    assert len(calls) == 2


def test_checkpointing_inside_fully_shard_gives_the_same_gradients():
    """One rank has all of FSDP2's hooks around each block; `test_distributed` trains on two."""
    alone = random_model()
    alone(**batch(LENGTHS))[0].backward()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        for checkpointed in (0, 2, 3):
            model = random_model()
            model.checkpointed = checkpointed
            for module in (*model.layers, model):
                fully_shard(module, mesh=mesh).set_force_sum_reduction_for_comms(True)  # gloo has no average
            for _ in range(2):  # the second pass shows that the first left nothing behind
                model.zero_grad()
                model(**batch(LENGTHS))[0].backward()
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(
                    p.grad.full_tensor(), q.grad, rtol=1e-6, atol=1e-6, msg=f"{checkpointed} {name}"
                )
    finally:
        distributed.destroy_process_group()
