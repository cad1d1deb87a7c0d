"""A task's memory beside a ViT: equal to vit-pytorch's, to attention under a written-out mask, and to the
paper's plain formula; and the network beside it stays as it is."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitrail
from tests.golden.compare import check
from tests.golden.compare import load as load_golden
from tests.golden.fill import fill, image, value
from tests.parity import assert_close_to_peer, randomise
from vitrail.backbones.vit import KeysValues, ViT, ViTConfig
from vitrail.learnable_memory import PLAIN, MemoryClassifier, MemoryConfig, MemoryHead, build
from vitrail.models import HEADS, create_model, list_models
from vitrail.registry import backbone_entry, list_backbones, tiny_entries
from vitrail_runtime.errors import InputError

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
SMALL |= {"mlp_ratio": 2.0}


def picture(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tiny(classes: int = 5, **fields: Any) -> MemoryClassifier:
    """A task in float64 whose every number says something: new heads answer zero. Beside the class token
    stands a register."""
    base = ViT(ViTConfig(**SMALL, num_reg_tokens=1))
    model = build(base, MemoryConfig(**fields), classes)
    randomise(model)
    return model.double().eval()


# Equal to others


class NormedPatches(nn.Module):
    """vit-pytorch's patches: cut as (row, column, channel), norm, linear, norm."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = 3 * patch_size**2
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, embed_dim), nn.LayerNorm(embed_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        cut = images.unfold(2, p, p).unfold(3, p, p)
        cut = cut.permute(0, 2, 3, 4, 5, 1).flatten(3)  # (B, h, w, p * p * 3)
        return self.layers(cut).permute(0, 3, 1, 2)


def from_vit_pytorch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of vit-pytorch's Adapter and its ViT."""
    ours: dict[str, Tensor] = {}
    inner = {"0.norm": "norm1", "0.to_out.0": "attn.proj", "1.net.0": "norm2"}
    inner |= {"1.net.1": "mlp.fc1", "1.net.4": "mlp.fc2"}
    for key, tensor in state.items():
        if found := re.match(r"vit\.transformer\.layers\.(\d)\.(.*)\.(weight|bias)", key):
            number, part, leaf = found.groups()
            if part == "0.to_q":
                both = state[key.replace("to_q", "to_kv")]
                ours[f"backbone.blocks.{number}.attn.qkv.weight"] = torch.cat([tensor, both])
            elif part != "0.to_kv":
                ours[f"backbone.blocks.{number}.{inner[part]}.{leaf}"] = tensor
        elif found := re.match(r"vit\.to_patch_embedding\.(\d)\.(\w+)", key):
            ours[f"backbone.patch_embed.layers.{int(found[1]) - 1}.{found[2]}"] = tensor
        elif found := re.match(r"mlp_head\.(\d)\.(\w+)", key):
            ours[f"head.{('norm', 'fc')[int(found[1])]}.{found[2]}"] = tensor
    return ours | {
        "backbone.cls_token": state["vit.cls_token"],
        "backbone.pos_embed": state["vit.pos_embedding"],
        "head.token": state["memory_cls_token"],
        "head.memory": state["memories_per_layer"],
    }


def as_vit_pytorch(
    state: dict[str, Tensor], size: tuple[int, int], classes: int, **shape: Any
) -> MemoryClassifier:
    config = ViTConfig(**shape, image_size=size, qkv_bias=False, norm_eps=1e-5)
    rows = state["memories_per_layer"].shape[1]
    fields: dict[str, Any] = {"start": "zero", "norm_memory": False, "norm": "own"}
    backbone = ViT(config, NormedPatches(config.patch_size, config.embed_dim))
    model = build(backbone, MemoryConfig(rows=rows, **fields), classes).eval()
    left = model.load_state_dict(from_vit_pytorch(state), strict=False)
    # It has no final norm.
    assert left.missing_keys == ["backbone.norm.weight", "backbone.norm.bias"]
    assert not left.unexpected_keys
    return model


def test_a_stored_run_of_vit_pytorch_is_repeated_and_its_vit_unchanged():
    facts, arrays = load_golden("memory_vit")
    state = {
        key: torch.from_numpy(value(key, shape, facts["fill"]["gain"]))
        for key, shape, dtype in facts["state_dict"]
        if dtype == "float32"
    }
    shape = {"embed_dim": 64, "depth": 3, "num_heads": 4, "patch_size": 8, "mlp_ratio": 1.5}
    model = as_vit_pytorch(state, (48, 48), 7, **shape).double()
    x = image(2, 48, 48).double()
    with torch.no_grad():
        logits = model(x)
        stream, _ = model.backbone.embed(x)
        for block in model.backbone.blocks:
            stream = block(stream)
        weight, bias = (state[f"vit.mlp_head.0.{k}"].double() for k in ("weight", "bias"))
        plain = F.layer_norm(stream[:, 0], (64,), weight, bias)
        plain = F.linear(
            plain, state["vit.mlp_head.1.weight"].double(), state["vit.mlp_head.1.bias"].double()
        )
    check("memory_vit", {"output": logits, "plain_vit_output": plain})
    # Who sees whom there (queries: task, class, patches; keys: the same, then memory) is what `mask` writes
    # out below.
    want = mask([{0}], base=1 + 36, rows=5)
    assert (arrays["attn_mask"].astype(bool) == want.numpy()).all()


def test_random_weights_answer_as_in_vit_pytorch():
    theirs = pytest.importorskip("vit_pytorch.learnable_memory_vit")
    vit = theirs.ViT(
        image_size=(16, 24),
        patch_size=8,
        num_classes=3,
        dim=24,
        depth=2,
        heads=3,
        dim_head=8,
        mlp_dim=36,
    )
    peer = theirs.Adapter(vit=vit, num_memories_per_layer=3, num_classes=4)
    peer.load_state_dict(fill(peer.state_dict()))
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "mlp_ratio": 1.5}
    model = as_vit_pytorch(peer.state_dict(), (16, 24), 4, **shape).double()
    x = picture(2, 3, 16, 24)
    with torch.no_grad():
        assert_close_to_peer(model(x), peer.double().eval()(x))


# Equal to formulas


def mask(sees: list[set[int]], base: int, rows: int) -> Tensor:
    """Who may attend to whom, (queries, keys): the tasks' tokens, then the network's, in that order; keys
    have each task's memory behind them. sees: of each task the tasks whose tokens and memory it sees."""
    tasks = len(sees)
    out = torch.zeros(tasks + base, tasks + base + tasks * rows, dtype=torch.bool)
    out[:, tasks : tasks + base] = True  # all see the network's tokens
    for i, seen in enumerate(sees):
        for j in seen:
            out[i, j] = True
            begin = tasks + base + j * rows
            out[i, begin : begin + rows] = True
    return out


def attended(block: Any, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """Multi-head attention by its formula, of normed tokens."""
    attn = block.attn
    (wq, wk, wv), (bq, bk, bv) = attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)
    width = wq.shape[0] // attn.num_heads
    outs = []
    for h in range(attn.num_heads):
        part = slice(h * width, (h + 1) * width)
        q = queries @ wq[part].T + bq[part]
        k = keys @ wk[part].T + bk[part]
        v = keys @ wv[part].T + bv[part]
        scores = q @ k.transpose(1, 2) / width**0.5
        outs.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
    return attn.proj(torch.cat(outs, dim=-1))


def by_mask(
    backbone: ViT, heads: list[MemoryHead], sees: list[set[int]], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One sequence of the tasks' and the network's tokens, under the mask: the network's class token behind
    its norm, and each task's logits."""
    batch, tasks = len(x), len(heads)
    stream, _ = backbone.embed(x)
    base = stream.shape[1]
    own = backbone.cls_token[0, 0] + backbone.pos_embed[0, 0]
    tokens = [h.token + own if h.config.start == "class" else h.token for h in heads]
    stream = torch.cat([torch.stack(tokens).expand(batch, -1, -1), stream], dim=1)
    rows = 0 if heads[0].memory is None else heads[0].config.rows
    for i, block in enumerate(backbone.blocks):
        normed = block.norm1(stream)
        memory = []
        for head in heads:
            if head.memory is not None:
                offered = head.memory[i].expand(batch, -1, -1)
                memory.append(block.norm1(offered) if head.config.norm_memory else offered)
        keys = torch.cat([normed, *memory], dim=1)
        stream = stream + attended(block, normed, keys, mask(sees, base, rows))
        stream = stream + block.mlp(block.norm2(stream))
    logits = [
        h.fc((backbone.norm if h.norm is None else h.norm)(stream[:, j]))
        for j, h in enumerate(heads)
    ]
    return backbone.norm(stream[:, tasks]), logits


FIELDS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "a token from nothing": {"start": "zero"},
    "memory as it is": {"norm_memory": False},
    "a norm of its own": {"norm": "own"},
    "no memory": {"rows": 0},
    "two rows": {"rows": 2},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_masked_form_is_attention_under_the_written_out_mask(fields):
    model = tiny(**fields)
    x = picture(2, 3, 8, 12)
    with torch.no_grad():
        token, (want,) = by_mask(model.backbone, [model.head], [{0}], x)
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.backbone(x).prefix[:, 0], token, rtol=0, atol=1e-12)


def test_every_field_of_the_head_changes_the_answer():
    x, said = picture(2, 3, 8, 12), {}
    for name, fields in {**FIELDS, "full": {"form": "full"}}.items():
        # Of equal weights as far as they have the same ones: `randomise` fills by name.
        said[name] = tiny(**fields)(x)
    names = list(said)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (said[one] - said[other]).abs().max() > 1e-3, (one, other)


def test_the_full_form_is_the_papers_memory_put_before_each_block_and_taken_off_behind_it():
    model = tiny(form="full")
    backbone, head, x = model.backbone, model.head, picture(2, 3, 8, 12)
    with torch.no_grad():
        stream, _ = backbone.embed(x)
        stream[:, 0] += head.token
        length = stream.shape[1]
        for i, block in enumerate(backbone.blocks):
            rows = head.memory[i].expand(2, -1, -1)
            # Rows pass the norm with the tokens; queries are the tokens' alone.
            keys = block.norm1(torch.cat([stream, rows], dim=1))
            every = torch.ones(length, length + 5, dtype=torch.bool)
            stream = stream + attended(block, keys[:, :length], keys, every)
            stream = stream + block.mlp(block.norm2(stream))
        want = head.fc(backbone.norm(stream[:, 0]))
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)


def test_later_tasks_read_what_earlier_ones_hand_out():
    first, second = tiny(), tiny(classes=3)
    backbone, x = first.backbone, picture(2, 3, 8, 12)
    with torch.no_grad():
        second.head.token.mul_(-1)
        second.head.memory.mul_(2)
        _, apart = by_mask(backbone, [first.head, second.head], [{0}, {1}], x)
        _, extended = by_mask(backbone, [first.head, second.head], [{0}, {0, 1}], x)
        base: list[KeysValues | None] = []
        backbone(x, keys_values=base)
        handed: list[KeysValues] = []
        one = first.head(backbone, base, handed=handed)
        others = [[offered] for offered in handed]
        again: list[KeysValues] = []
        two = second.head(backbone, base, others=others, handed=again)
        torch.testing.assert_close(one, apart[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(second.head(backbone, base), apart[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(two, extended[1], rtol=0, atol=1e-12)
    assert (extended[1] - apart[1]).abs().max() > 1e-3
    # What is handed out: the token's and its memory's, for every image.
    assert [kv.keys.shape for kv in again] == 3 * [(2, 2, 1 + 5, 16)]
    bare: list[KeysValues] = []
    alone = tiny(rows=0)
    alone.head(alone.backbone, base, handed=bare)
    assert [kv.values.shape for kv in bare] == 3 * [(2, 2, 1, 16)]


# The network beside it


def test_the_network_says_the_same_to_the_last_bit_with_a_task_beside_it():
    torch.manual_seed(0)
    plain = create_model("vit_tiny_patch16", num_classes=4, **SMALL)
    randomise(plain)
    plain.eval()
    x = picture(3, 3, 16, 12).float()
    with torch.no_grad():
        before = plain(x)
        model = build(plain.backbone, MemoryConfig(), 6)
        randomise(model.head)
        keys_values: list[KeysValues | None] = []
        features = plain.backbone(x, keys_values=keys_values)
        model.head(model.backbone, keys_values)
        assert torch.equal(plain.head(features), before)
        assert torch.equal(plain(x), before)
        assert (model(x)[:, :4] - before).abs().max() > 0


def test_no_graph_is_built_for_a_frozen_network_and_all_that_the_task_owns_learns():
    model = tiny().train()
    model.backbone.requires_grad_(False)
    x = picture(2, 3, 8, 12)
    keys_values: list[KeysValues | None] = []
    features = model.backbone(x, keys_values=keys_values)
    assert not any(kv.keys.requires_grad or kv.values.requires_grad for kv in keys_values)
    assert not features.prefix.requires_grad
    model.losses(x, torch.tensor([0, 3]))["classify"].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    owned = dict(model.head.named_parameters())
    assert owned.keys() == {"token", "memory", "fc.weight", "fc.bias"}
    assert all(p.grad.abs().amin(-1).max() > 0 for p in owned.values())


@pytest.mark.parametrize("form", ["masked", "full"])
def test_every_parameter_receives_a_finite_gradient(form):
    model = tiny(form=form).train()
    model.losses(picture(2, 3, 8, 12), torch.tensor([0, 3]))["classify"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# How it starts, and what it owns


def test_new_tasks_start_as_the_paper_says():
    torch.manual_seed(0)
    base = ViTConfig(embed_dim=384, depth=12, num_heads=6)
    head = MemoryHead(MemoryConfig(rows=10), base, 7)
    assert head.memory.shape == (12, 10, 384)
    assert head.memory.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(head.memory.mean().item()) < 1e-3
    assert not head.token.any()
    assert not head.fc.weight.any()
    assert not head.fc.bias.any()
    assert head.norm is None
    own = MemoryHead(MemoryConfig(start="zero", norm="own", rows=0), base, 7)
    assert own.token.std().item() == pytest.approx(0.02, rel=0.1)
    assert own.norm.eps == 1e-6
    assert own.memory is None
    assert own.state_dict().keys() == {"token", "norm.weight", "norm.bias", "fc.weight", "fc.bias"}


def test_the_full_form_without_a_trained_task_is_the_network_alone():
    model = tiny(form="full", rows=0)
    with torch.no_grad():
        model.head.token.zero_()
        x = picture(2, 3, 8, 12)
        want = model.head.fc(model.backbone(x).prefix[:, 0])
        assert torch.equal(model(x), want)


# By name


def test_it_is_a_classifier_by_name_that_sees_images_as_its_backbone_does(tmp_path):
    torch.manual_seed(0)
    model = create_model(
        "memory/deit_tiny_distilled_patch16", classes=["a", "b"], head={"rows": 2}, depth=2
    )
    assert model.task == "classify"
    assert model.classes == ("a", "b")
    entry = backbone_entry("deit_tiny_distilled_patch16")
    assert model.preprocessing == entry.preprocessing
    assert model.backbone.config == replace(entry.config, depth=2)
    randomise(model)
    vitrail.save(model, tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    x = picture(2, 3, 32, 48).float()
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
        assert torch.equal(again.forward_tensors(x)["logits"], again(x))
    assert again.head.config == MemoryConfig(rows=2)
    assert again.info.parts["head"] == MemoryConfig(rows=2)


def test_names_are_listed_where_a_slash_asks_for_them_and_of_plain_vits_alone():
    names = list_models("memory/*")
    assert "memory/vit_tiny_patch16" in names
    assert names == list_models("memory/*", task="classify")
    assert not list_models("memory/*", task="segment")
    assert "memory/vit_tiny_patch16" not in list_models(task="classify")
    assert "memory/resnet18" not in names
    assert {n for n, head in HEADS.items() if head.whole} == {"clip", "siglip", "memory"}
    vits = [n for n in list_backbones() if issubclass(backbone_entry(n).cls, ViT)]
    assert names == [f"memory/{n}" for n in vits]
    for pattern in PLAIN:
        assert list_models(f"memory/{pattern}"), pattern


@pytest.mark.parametrize("family", tiny_entries())
def test_every_family_takes_a_task_or_says_why_not(family):
    entry = tiny_entries()[family]
    backbone = entry.cls(entry.config)
    if not isinstance(backbone, ViT):
        with pytest.raises(
            InputError, match=r"a plain ViT, which this backbone is not; .* vit_\*, deit_\*"
        ):
            build(backbone, MemoryConfig(), 3)
        return
    if any(block.attn is None for block in backbone.blocks):
        with pytest.raises(InputError, match="blocks 1 of this ViT do not attend"):
            build(backbone, MemoryConfig(), 3)
        return
    configs = [MemoryConfig(), MemoryConfig(form="full")]
    if backbone.cls_token is None:
        for config in configs:
            with pytest.raises(InputError, match=r"has no class token.*start=zero"):
                build(backbone, config, 3)
        configs = [MemoryConfig(start="zero")]
    x = picture(2, 3, 32, 48).float()
    for config in configs:
        model = build(backbone, config, 3)
        randomise(model)
        model.eval()
        with torch.no_grad():
            logits = model(x)
            assert logits.shape == (2, 3)
            torch.testing.assert_close(logits[1:], model(x[1:]), rtol=1e-4, atol=1e-5)
            model.head.memory.neg_()
            assert (model(x) - logits).abs().max() > 1e-4


def test_a_network_without_a_final_norm_needs_the_tasks_own():
    backbone = ViT(ViTConfig(**SMALL))
    backbone.register_module("norm", nn.Identity())
    with pytest.raises(InputError, match="has no final norm; give norm='own'"):
        build(backbone, MemoryConfig(), 3)
    build(backbone, MemoryConfig(norm="own"), 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": -1}, "rows of memory must be 0 or more, but are -1"),
        ({"rows": 2.5}, "rows of memory must be int, but is 2.5"),
        ({"rows": True}, "rows of memory must be int, but is True"),
        ({"norm_memory": "no"}, "norm_memory of memory must be bool, but is 'no'"),
        ({"form": "both"}, "memory.form is 'both', but must be one of ['masked', 'full']"),
        ({"start": "none"}, "memory.start is 'none', but must be one of ['class', 'zero']"),
        ({"rows": 0, "norm_memory": False}, "norm_memory is about memory, but rows is 0"),
        ({"form": "full", "start": "zero"}, "form='full' learns the network's own class token"),
        ({"form": "full", "norm": "own"}, "leave them away"),
        ({"form": "full", "norm_memory": False}, "leave them away"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        MemoryConfig(**fields)


def test_packs_and_streams_that_are_none_are_refused():
    with torch.device("meta"):
        model = create_model("memory/vit_tiny_patch16", num_classes=2, **SMALL)
    said = "cannot take packed images: its head reads keys and values, which packs do not hand out"
    with pytest.raises(InputError, match=said):
        vitrail.models.check_takes_packs(model)
    layout = {"sizes": [(4, 4)], "patch_size": 4}
    with pytest.raises(InputError, match="a task with memory cannot take packed images"):
        model.forward_tensors(torch.zeros(1, 48), packing=layout)
    full = tiny(form="full")
    with pytest.raises(InputError, match="form='full' is no stream of its own"):
        full.head(full.backbone, [])


@pytest.mark.parametrize("form", ["masked", "full"])
def test_what_a_pass_records_is_what_the_network_sees_in_it(form):
    model = tiny(form=form)
    x, record, want = picture(2, 3, 8, 12), {}, {}
    with torch.no_grad():
        torch.testing.assert_close(model(x, record), model(x), rtol=0, atol=1e-12)
        given: dict[str, Any] = {}
        if form == "full":
            given = {"memory": list(model.head.memory), "class_offset": model.head.token}
        model.backbone(x, want, **given)
    assert {f"blocks.{i}" for i in range(3)} < record.keys()
    assert record.keys() == want.keys()
    assert all(torch.equal(record[key], value) for key, value in want.items())


@pytest.mark.parametrize("form", ["masked", "full"])
def test_blocks_that_are_computed_again_answer_and_learn_as_otherwise(form):
    """grad_checkpointing; what blocks hand out is handed out nevertheless."""
    model = tiny(form=form).train()
    x, found = picture(2, 3, 8, 12), []
    for again in (False, True):
        model.backbone.grad_checkpointing = again
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        found.append(
            (logits.detach(), model.head.memory.grad.clone(), model.head.token.grad.clone())
        )
    for one, other in zip(*found, strict=True):
        assert one.any()
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_the_full_form_may_be_asked_at_another_patch_size():
    model = create_model("memory/vit_tiny_patch16", num_classes=2, head={"form": "full"}, **SMALL)
    randomise(model)
    model.double().eval()
    vitrail.models.use_patch_sizes(model, 4, 2)
    x, head = picture(2, 3, 8, 12), model.head
    with torch.no_grad():
        small = model.forward_tensors(x, patch_size=2)["logits"]
        given: dict[str, Any] = {"memory": list(head.memory), "class_offset": head.token}
        features = model.backbone(x, patch_size=2, **given)
        assert torch.equal(small, head.fc(features.prefix[:, 0]))
        assert (small - model(x)).abs().max() > 1e-3


def test_a_task_may_be_asked_at_another_patch_size():
    model = create_model("memory/vit_tiny_patch16", num_classes=2, **SMALL)
    randomise(model)
    model.double().eval()
    vitrail.models.use_patch_sizes(model, 4, 2)
    x = picture(2, 3, 8, 12)
    with torch.no_grad():
        small = model.forward_tensors(x, patch_size=2)["logits"]
        assert torch.equal(model.forward_tensors(x)["logits"], model(x))
        keys_values: list[KeysValues | None] = []
        model.backbone(x, keys_values=keys_values, patch_size=2)
        assert torch.equal(small, model.head(model.backbone, keys_values))
        assert (small - model(x)).abs().max() > 1e-3
