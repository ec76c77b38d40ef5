"""Methods that choose tokens: ToCa, ClusCa, Token Merging."""

from __future__ import annotations

import diffusers as d
import pytest
import torch
from contract_cases import context_at
from diffusers.models.transformers.transformer_wan import WanAttention
from tiny_pipelines import built, run

import accel
from accel.caches import to_ca
from accel.caches.clus_ca import _Clusters
from accel.caches.to_ca import _entropy, _Influence, _spread, _Tokens
from accel.site import Computed

MERGING = ["sd15", "sdxl", "pixart", "dit", "latte", "sd3"]
CROSS = ["sd15", "sdxl", "pixart", "wan21", "wan22", "ltx", "latte"]


def rows(value: list[float]) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("family", ["wan21", "pixart", "flux"])
def test_no_fresh_token_is_fora_with_a_full_last_step(family) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.ToCa(interval=7, warmup=1, ratio=0)):
        none = run(tiny)
    with accel.patched(tiny.pipe, accel.FORA(interval=7)):
        assert torch.equal(run(tiny), none)


@pytest.mark.parametrize("family", ["wan21", "pixart"])
def test_all_tokens_fresh_reuse_attention_alone(family) -> None:
    """Every MLP token computed on a skipped step is what computing the MLP gives."""
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.ToCa(interval=7, warmup=1, ratio=1, cross=0)) as handle:
        every = run(tiny)
        assert handle.report().hit_rate > 0
    reach = {"spatial": 7, "temporal": 7, "cross": 7, "window": (-1, 2000)}
    with accel.patched(tiny.pipe, accel.PyramidAttentionBroadcast(**reach)):
        attention = run(tiny)
    assert torch.allclose(every, attention, atol=1e-5)


def test_more_fresh_tokens_are_counted_as_work() -> None:
    tiny, _ = built("pixart")
    shares = []
    for ratio in (0, 0.3, 0.6, 1):
        with accel.patched(tiny.pipe, accel.ToCa(interval=4, warmup=1, ratio=ratio)) as handle:
            run(tiny)
            shares.append(handle.report().share_computed)
    assert shares == sorted(set(shares))


def test_the_best_token_of_each_cell_is_raised() -> None:
    score = torch.arange(16.0).reshape(1, 16)
    raised = _spread(score, (1, 4, 4), 2, 1.0)
    changed = (raised != score).nonzero()[:, 1].tolist()
    assert changed == [5, 7, 13, 15]
    assert torch.equal(raised[0, changed], 2 * score[0, changed])
    with pytest.raises(accel.AccelError, match="no whole cells"):
        _spread(score, (1, 4, 4), 3, 1.0)


def test_ages_advance_and_fresh_tokens_start_anew() -> None:
    """With equal influence the stalest tokens are computed: all of them in turn."""
    policy = _Tokens(accel.ToCa(ratio=0.5, interval=9), _Mlp, _Influence(bool), False, 0.0)
    output = torch.zeros(1, 4, 2)
    policy.computed(None, None, Computed((output, None, None), (output,), (output,)))
    chosen: list[list[int]] = []

    def compute(indices: torch.Tensor) -> tuple[torch.Tensor]:
        chosen.append(sorted(indices[0].tolist()))
        return (torch.ones(1, indices.shape[1], 2) * len(chosen),)

    for step in (1, 2):
        (result,) = policy.refine(context_at(step, 10), None, (output,), compute)
    assert sorted(chosen[0] + chosen[1]) == [0, 1, 2, 3]
    assert result[0, chosen[0], 0].tolist() == [1, 1], "fresh values stay"
    assert result[0, chosen[1], 0].tolist() == [2, 2]
    assert sorted(policy.age[0].tolist()) == [0, 0, 1, 1]


class _Mlp:
    kind, block = "mlp", 0


def test_guidance_halves_choose_the_same_tokens() -> None:
    torch.manual_seed(0)
    block = built("pixart")[0].pipe.transformer.transformer_blocks[0]
    hidden = torch.randn(4, 6, block.attn2.to_q.in_features)
    text = torch.randn(4, 5, block.attn2.to_k.in_features)
    influence = _Influence(halves=lambda: True)
    influence.of_attention(block.attn2, hidden, text, None)
    assert torch.equal(influence.score[:2], influence.score[2:])
    alone = _entropy(block.attn2, hidden, text)
    assert (alone[:2] - alone[2:]).abs().max() > 0
    assert (alone > 0).all()


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_images_of_a_batch_do_not_share_their_tokens(family) -> None:
    tiny, _ = built(family)
    with accel.patched(tiny.pipe, accel.ToCa(ratio=0.4, warmup=1)):
        first, other = (
            run(
                tiny,
                num_images_per_prompt=2,
                generator=[torch.Generator().manual_seed(seed) for seed in (0, mate)],
                guidance_scale=1.0,
            )
            for mate in (1, 7)
        )
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_words_behind_the_mask_change_nothing() -> None:
    tiny, _ = built("pixart")
    embeds, mask, negative, negative_mask = tiny.pipe.encode_prompt("a cat", device="cpu")
    noisy = embeds.clone()
    noisy[mask == 0] += torch.randn(noisy[mask == 0].shape)
    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
    }
    with accel.patched(tiny.pipe, accel.ToCa(ratio=0.4, warmup=1)):
        first, second = (run(tiny, prompt_embeds=each, **given) for each in (embeds, noisy))
    assert (mask == 0).any()
    assert torch.equal(first, second)


@pytest.mark.parametrize("at_once", [4096, 4])
def test_masks_are_biases_or_kept_words(at_once, monkeypatch) -> None:
    torch.manual_seed(0)
    attention = d.models.attention_processor.Attention(8, 6, heads=2, dim_head=4)
    hidden, text = torch.randn(1, 6, 8), torch.randn(1, 5, 6)
    wanted = _entropy(attention, hidden, text[:, :3])
    monkeypatch.setattr(to_ca, "ROWS", at_once)  # the tokens are taken a part at a time
    kept = torch.tensor([[1, 1, 1, 0, 0]])
    bias = -10000.0 * (1 - kept.float()).unsqueeze(1)
    for mask in (kept, kept.bool(), bias, bias.unsqueeze(1)):
        assert torch.allclose(_entropy(attention, hidden, text, mask), wanted, atol=1e-5)


def test_heads_that_share_keys_are_scored() -> None:
    torch.manual_seed(0)
    parts = {"query_dim": 16, "cross_attention_dim": 6, "heads": 4, "dim_head": 4}
    grouped = d.models.attention_processor.Attention(**parts, kv_heads=2)
    full = d.models.attention_processor.Attention(**parts)
    full.to_q.load_state_dict(grouped.to_q.state_dict())
    wide = grouped.to_k.weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.to_k.weight.data = wide
    hidden, text = torch.randn(1, 6, 16), torch.randn(1, 5, 6)
    assert torch.equal(_entropy(grouped, hidden, text), _entropy(full, hidden, text))


class _Cross:
    kind, block = "cross", 0

    def __init__(self, attention: torch.nn.Module) -> None:
        self.modules = (attention,)


def scores_of(attention: torch.nn.Module, hidden: torch.Tensor, text) -> torch.Tensor:
    influence = _Influence(bool)
    policy = _Tokens(accel.ToCa(), _Cross(attention), influence, True, 0.0)
    policy.computed(None, None, Computed((hidden, text, None), (hidden,), (hidden,)))
    return influence.score


def test_an_ip_adapter_picture_is_not_a_part_of_the_text() -> None:
    attention = built("sd15")[0].pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    torch.manual_seed(0)
    hidden = torch.randn(1, 6, attention.to_q.in_features)
    text = torch.randn(1, 5, attention.to_k.in_features)
    found = scores_of(attention, hidden, (text, [torch.randn(1, 1, 4, 8)]))
    assert torch.equal(found, scores_of(attention, hidden, text))


def test_wan_scores_by_the_words_behind_the_picture() -> None:
    torch.manual_seed(0)
    attention = WanAttention(
        8, heads=2, dim_head=4, added_kv_proj_dim=8, cross_attention_dim_head=4
    )
    hidden, words = torch.randn(1, 6, 8), torch.randn(1, 512, 8)
    found = [
        scores_of(attention, hidden, torch.cat((torch.randn(1, 7, 8), each), dim=1))
        for each in (words, words, words.flip(0).roll(1, -1))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_every_block_of_a_unet_layer_has_its_own_scores(monkeypatch) -> None:
    made: dict[int, set[int]] = {}
    begin = _Tokens.__init__

    def watch(self, settings, layer, influence, *rest) -> None:
        made.setdefault(id(layer.parent), set()).add(id(influence))
        begin(self, settings, layer, influence, *rest)

    monkeypatch.setattr(_Tokens, "__init__", watch)
    tiny, _ = built("sdxl")
    with accel.patched(tiny.pipe, accel.ToCa()):
        run(tiny, num_inference_steps=1)
    assert all(len(each) == 1 for each in made.values())
    assert len(set.union(*made.values())) == len(made)


def test_clusters_are_found_and_each_gives_a_member() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    torch.manual_seed(0)
    tokens = (centres.repeat(4, 1) + 0.1 * torch.randn(12, 2)).unsqueeze(0)
    clusters = _Clusters(3)
    clusters.centres = tokens[:, [0, 1, 2]]
    clusters.update(tokens)
    assert clusters.members[0].tolist() == [0, 1, 2] * 4
    for _ in range(5):
        assert clusters.members[0][clusters.picks()[0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", MERGING)
def test_nothing_merged_is_bit_exact(family) -> None:
    tiny, baseline = built(family)
    with accel.patched(tiny.pipe, accel.TokenMerging(ratio=0)):
        assert torch.equal(run(tiny), baseline)
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize("family", MERGING)
def test_merging_acts_and_starts_fresh(family) -> None:
    tiny, baseline = built(family)
    change = {"height": 2 * tiny.call["height"]} if "height" in tiny.call else {}
    method = accel.TokenMerging(ratio=0.5, mlp=True, cross=family in CROSS, max_downsample=4)
    with accel.patched(tiny.pipe, method):
        first = run(tiny)
        run(tiny, **change)
        assert torch.equal(run(tiny), first)
    assert not torch.equal(first, baseline)
    assert torch.isfinite(first).all()
    assert torch.equal(run(tiny), baseline)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (6, 4)])
@pytest.mark.parametrize("random", [True, False])
def test_unmerging_gives_every_token_itself_or_its_destination(height, width, random) -> None:
    torch.manual_seed(0)
    method = accel.TokenMerging(ratio=0.5, random=random)
    hidden = torch.randn(2, height * width, 8)
    merge, unmerge = method.plan(hidden, (1, height, width), torch.Generator().manual_seed(0))
    merged = merge(hidden)
    count = min(height * width - (height // 2) * (width // 2), int(height * width * 0.5))
    assert merged.shape == (2, height * width - count, 8)
    back = unmerge(merged)
    same = (back == hidden).all(-1).sum(1)
    kept = height * width - count - (height // 2) * (width // 2)
    assert (same >= kept).all()
    index = torch.arange(merged.shape[1]).float().reshape(1, -1, 1).expand(2, -1, 8)
    assert set(unmerge(index).unique().tolist()) == set(range(merged.shape[1]))


def test_identical_tokens_merge_without_loss() -> None:
    cell = torch.randn(1, 2, 2, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    hidden = cell.reshape(1, 16, 8)
    merge, unmerge = accel.TokenMerging(ratio=0.75).plan(hidden, (1, 4, 4), torch.Generator())
    assert merge(hidden).shape[1] == 4
    assert torch.allclose(unmerge(merge(hidden)), hidden, atol=1e-6)


def test_odd_batches_use_no_random_places() -> None:
    method, generator = accel.TokenMerging(), torch.Generator().manual_seed(0)
    first = method.destinations(6, 6, 3, generator)
    assert first[::2, ::2].all()
    assert first.sum() == 9
    assert not torch.equal(method.destinations(6, 6, 2, generator), first)


@pytest.mark.parametrize("family", ["flux", "wan21", "ltx"])
def test_merging_is_refused_for_rotary_embeddings(family) -> None:
    tiny, baseline = built(family)
    with pytest.raises(accel.AccelError, match="rotary"):
        accel.patch(tiny.pipe, accel.TokenMerging())
    assert torch.equal(run(tiny), baseline)


def test_merging_combines_with_a_cache_of_blocks() -> None:
    tiny, _ = built("sd15")
    merging = accel.TokenMerging(max_downsample=4)
    methods = (accel.PlainCycle(interval=2), merging, accel.TextCache())
    with accel.patched(tiny.pipe, *methods) as handle:
        both = run(tiny)
        assert 0.4 < handle.report().share_computed < 0.6
    with accel.patched(tiny.pipe, methods[0]):
        assert not torch.equal(run(tiny), both)
