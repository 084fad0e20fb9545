"""Two lines for any model: swap, update, fuse and save across architectures; padding; what stays plain, and why."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import zoo
from torch import Tensor, nn

from hf_dbp.any_model import decorrelate, survey_layers
from hf_dbp.conversion import decorrelated_layers, fuse
from hf_dbp.layers import RowSampling
from hf_dbp.probing import LayerInput, linear_table, probe
from hf_dbp.sharing import SharingLayer
from hf_dbp.update import configure_sampling, decorrelations, update_decorrelation

MODELS = pytest.mark.parametrize("title", zoo.ZOO)
ALL_ROWS = RowSampling(fraction=1.0)


def made(title):
    torch.manual_seed(0)
    model, batch = zoo.ZOO[title]()
    return model.eval(), batch


def decorrelated(title, sampling=ALL_ROWS):
    model, batch = made(title)
    decorrelate(model, "all", batch=batch)
    configure_sampling(model, sampling)
    return model, batch


def disturb(model):
    """Give every R a random value near the identity."""
    torch.manual_seed(1)
    for _, decorrelation in decorrelations(model):
        decorrelation.R.add_(0.05 * torch.randn_like(decorrelation.R))


def step(model, batch, eta=0.01):
    """A training forward pass, and the update of R that follows the optimizer step."""
    model.train()
    zoo.output(model, batch)
    return update_decorrelation(model, eta=eta, bound=False)


def matrices(model):
    return {name: decorrelation.R.clone() for name, decorrelation in decorrelations(model)}


@MODELS
def test_the_swap_changes_nothing_to_the_bit(title):
    """Outputs, gradients and random numbers, dropout included."""
    plain, batch = made(title)
    swapped, _ = decorrelated(title)
    assert type(swapped) is type(plain)
    trainable = {name: p for name, p in swapped.named_parameters() if p.requires_grad}
    assert trainable.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    for training in (False, True):
        outputs = []
        for model in (plain, swapped):
            torch.manual_seed(2)
            outputs.append(zoo.output(model.train(training), batch))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for name, parameter in plain.named_parameters():
            if name in trainable:
                theirs, ours = parameter.grad, trainable[name].grad
                assert theirs is ours is None or torch.equal(theirs, ours), name


@MODELS
def test_an_update_is_the_formula_on_the_tokens_of_each_shared_input(title):
    """R - eta C R with C from z = R x of the layer's own input, seen by a hook of the test; padding is left out."""
    model, batch = decorrelated(title)
    disturb(model)
    seen = {}
    for name, layer in decorrelated_layers(model):
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen.setdefault(name, []).append(args[0]))  # type: ignore[attr-defined]
    before = matrices(model)
    shares = step(model, batch)
    assert shares.keys() == before.keys()
    for name, R in before.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            x = torch.cat([nn.functional.unfold(x, layer.kernel_size, stride=layer.stride).mT for x in seen[name]])
            x = x.flatten(0, 1)
        else:
            x = torch.cat([zoo.tokens(model, batch, x) for x in seen[name]])
        z = (x @ R.T).detach()
        C = z.T @ z / len(z)
        C.fill_diagonal_(0)
        torch.testing.assert_close(layer.decorrelation.R, nn.Parameter(R - 0.01 * C @ R, requires_grad=False), msg=name)
    sharing = {}
    for name, layer in decorrelated_layers(model):
        sharing.setdefault(layer.decorrelation, []).append(name)
    assert any(len(names) > 1 for names in sharing.values()) or title in ("GPT2LMHeadModel", "ConvNextModel")
    for names in sharing.values():  # one R, one input
        assert all(a is b for other in names for a, b in zip(seen[names[0]], seen[other], strict=True))


@MODELS
def test_fusing_gives_the_stock_model_in_float64(title):
    plain, batch = made(title)
    plain, batch = plain.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    swapped, _ = decorrelated(title)
    swapped.double()
    disturb(swapped)
    fused = fuse(swapped)
    assert type(fused) is type(plain) and repr(fused) == repr(plain)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_pre_hooks for module in fused.modules())
    torch.testing.assert_close(zoo.output(fused, batch), zoo.output(swapped.eval(), batch), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(zoo.output(fused, batch), zoo.output(plain, batch))


@MODELS
def test_what_is_saved_loads_in_the_stock_class(title, tmp_path, recwarn):
    """Fused, it is bit-identical. Unfused, it is the same function, and the decorrelated model resumes from it bit for
    bit."""
    model, batch = decorrelated(title)
    disturb(model)
    fused = fuse(model)
    for name, saved in (("fused", fused), ("unfused", model)):
        saved.eval().save_pretrained(tmp_path / name)
        if "peft" in title:
            from peft import PeftModel

            base, _ = zoo.bert()
            base.load_state_dict(made("BertForMaskedLM")[0].state_dict())
            loaded = PeftModel.from_pretrained(base, tmp_path / name)
        else:
            loaded = type(saved).from_pretrained(tmp_path / name)
        loaded.eval()
        torch.testing.assert_close(zoo.output(loaded, batch), zoo.output(saved, batch), rtol=1e-4, atol=1e-5)
        if name == "fused":
            assert torch.equal(zoo.output(loaded, batch), zoo.output(fused, batch))
    again, _ = decorrelated(title)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    again.load_state_dict(fused.state_dict(), strict=False)  # a plain checkpoint: R = I
    assert torch.equal(zoo.output(again.eval(), batch), zoo.output(fused, batch))


def test_the_table_of_the_page_is_what_the_models_show():
    page = zoo.PAGE.read_text(encoding="utf-8")
    assert page.partition(zoo.BEGIN)[2].partition(zoo.END)[0].strip() == zoo.table(), "run: python tests/zoo.py"


# ---- padding ----


@pytest.mark.parametrize(
    "title", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_padding_never_enters_c(title, fraction):
    """The content of the padding does not change R by a bit; without the mask it would."""
    results = []
    for filler, masked in ((0, True), (7, True), (0, False), (7, False)):
        model, batch = decorrelated(title, RowSampling(fraction=fraction))
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        if not masked:
            del batch["attention_mask"]
        step(model.eval(), batch)
        results.append(matrices(model))
    equal = [all(torch.equal(a[name], b[name]) for name in a) for a, b in (results[:2], results[2:])]
    assert equal == [True, False]


class TwoTowers(nn.Module):
    """A part that is given a mask beside one that is given none, and one whose tokens do not fit the mask."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, attention_mask=None):
            return self.linear(x)

    def __init__(self):
        super().__init__()
        self.text, self.vision, self.pooled, self.flat, self.other = (self.Tower() for _ in range(5))
        self.other = nn.Linear(6, 2)  # type: ignore[assignment]

    def forward(self, x, image, attention_mask=None):
        x = self.text(x, attention_mask)
        pooled = self.pooled(x[:, 0], attention_mask)
        flat = self.flat(x.flatten(0, 1), attention_mask)
        return pooled.sum() + flat.sum() + self.vision(image).sum() + self.other(x[:, :3]).sum()


def test_which_rows_count_under_a_mask(caplog):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = {"x": torch.randn(2, 4, 6), "image": torch.randn(2, 5, 6), "attention_mask": mask}
    model = TwoTowers()
    assert "tokens and padding look alike" in {one.names[0]: one.plain for one in probe(model, batch)}["other"]
    decorrelate(model, "all", batch={key: value for key, value in batch.items() if key != "attention_mask"})
    configure_sampling(model, ALL_ROWS)
    model.train()(**batch)
    rows = {name: d.rows if d.rows is None else len(d.rows) for name, d in decorrelations(model)}
    assert rows == {
        "text.linear": 5, "pooled.linear": 2, "flat.linear": 5, "vision.linear": 10, "other": None
    }  # fmt: skip
    assert "The shape of other's input does not match the attention mask" in caplog.text
    assert torch.equal(model.text.linear.decorrelation.rows, batch["x"][mask.bool()])
    del batch["attention_mask"]
    model(**batch)
    assert len(model.other.decorrelation.rows) == 6


def test_torchs_own_layers_mask_what_is_padding_and_never_take_w_for_w_r():
    """In eval mode they have a fast path that reads weights; the hooks keep it off."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padded = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, True, True, True]])
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    batch = {"src": x, "src_key_padding_mask": padded}
    found = {one.names[0]: one.plain for one in probe(model, batch)}
    assert found["layers.0.linear1"] == found["layers.1.linear2"] == ""
    assert "one parameter" in found["layers.0.self_attn"]
    assert found["layers.0.self_attn.out_proj"].startswith("NonDynamicallyQuantizableLinear")
    decorrelate(model, "all", batch=batch)
    configure_sampling(model, ALL_ROWS)
    disturb(model)
    trained = model.train()(**batch)
    assert len(model.layers[0].linear1.decorrelation.rows) == 7
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch), trained)
        torch.testing.assert_close(fuse(model)(**batch)[~padded], trained[~padded])
    crossed = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    decorrelate(crossed, "all", batch=(x.transpose(0, 1),))
    configure_sampling(crossed, ALL_ROWS)
    crossed(x.transpose(0, 1).clone(), src_key_padding_mask=padded)
    assert len(crossed.linear1.decorrelation.rows) == 7


# ---- what stays plain, and sharing ----


class Doubtful(nn.Module):
    """Layers that cannot be decorrelated, and two that can."""

    class Packed(nn.Linear):
        """A weight as quantising libraries hold it."""

    class QuantizedLinear(nn.Module):
        """A layer of another library that is not even an nn.Linear."""

        def forward(self, x):
            return x

    def __init__(self):
        super().__init__()
        self.good, self.frozen, self.read, self.idle, self.hooked = (nn.Linear(4, 4) for _ in range(5))
        self.packed, self.named = self.Packed(4, 4), nn.Linear(4, 4)
        self.tied, self.embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
        self.tied.weight = self.embedding.weight
        self.frozen.weight.requires_grad_(False)
        self.hooked.register_forward_hook(lambda *_: None)
        self.dynamic = self.QuantizedLinear()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        y = self.good(x) + self.frozen(x) + self.packed(x) + self.hooked(x) + self.named(input=x)
        y = y + nn.functional.linear(x, self.read.weight) + self.read(x) + self.attention(x, x, x)[0]
        return self.tied(y + self.dynamic(x))


def test_every_layer_that_must_stay_plain_says_why():
    model, x = Doubtful(), torch.randn(5, 4)
    expected = {
        "good": "", "frozen": "frozen", "read": "other code reads its weight", "idle": "never calls it",
        "hooked": "hooks", "packed": "Packed is not a plain nn.Linear", "named": "keyword", "tied": "that of embedding",
        "dynamic": "QuantizedLinear is not a plain nn.Linear", "attention": "nn.MultiheadAttention",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not a plain nn.Linear",
    }  # fmt: skip
    found = {name: one.plain for one in probe(model, x) for name in one.names}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name] and bool(reason) == bool(found[name]), (name, found[name])
        if reason:
            with pytest.raises(ValueError, match=f"{name} cannot be decorrelated: .*{reason}"):
                decorrelate(copy.deepcopy(model), lambda _, other, name=name: other == name, batch=x)  # type: ignore[misc]
    assert [name for name, _ in decorrelated_layers(decorrelate(model, "all", batch=x))] == ["good"]


class Shared(nn.Module):
    """One input behind two dropouts, one that is written to in place, one layer that is called three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.again = (nn.Linear(4, 4) for _ in range(7))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.a(x) + self.b(x.view(-1, 4).view_as(x))
        y = y + self.c(self.dropout(x)) + self.d(nn.functional.dropout(x, 0.5, training=self.training))
        z = y.clone()
        y = self.e(z)
        z.add_(1.0)
        y = y + self.f(z)
        for _ in range(3):
            y = self.again(y.tanh())
        return y


def test_sharing_follows_the_identity_of_the_input():
    model = decorrelate(Shared(), "all", batch=torch.randn(6, 4))
    configure_sampling(model, ALL_ROWS)
    layers = dict(decorrelated_layers(model))
    assert layers["a"].decorrelation is layers["b"].decorrelation
    assert len({layer.decorrelation for layer in layers.values()}) == 6
    model(torch.ones(6, 4))
    rows = {name: d.rows for name, d in decorrelations(model)}
    assert rows.keys() == {"a", "c", "d", "e", "f", "again"}
    assert len(rows["again"]) == 3 * 6 and len(rows["a"]) == 6
    assert set(rows["c"].unique().tolist()) == {0.0, 2.0}  # what dropout leaves is what the layer sees


def test_a_shared_r_moves_copies_and_pickles_with_its_owner():
    model = decorrelate(Shared(), "all", batch=torch.randn(6, 4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.a.decorrelation is other.b.decorrelation is not model.a.decorrelation
        other.a.decorrelation.R.mul_(2)
        assert torch.equal(other.b(torch.ones(1, 4)), other.b.fuse()(torch.ones(1, 4)))
    assert model.double().b.decorrelation.R.dtype == torch.float64
    names = [name for name in model.state_dict() if name.endswith("R")]
    assert names == [f"{name}.decorrelation.R" for name in "acdef"] + ["again.decorrelation.R"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert):
        return sum(self.experts[i](x[expert == i]).sum() for i in range(3) if (expert == i).any())


def test_an_expert_without_tokens_keeps_r_and_one_with_few_takes_a_stable_step():
    x = torch.randn(40, 4) * 20
    model = decorrelate(Experts(), "all", batch=(x, torch.arange(40) % 3))
    configure_sampling(model, ALL_ROWS)
    expert = torch.zeros(40, dtype=torch.int64)
    expert[7] = 1
    model.train()(x, expert)
    shares = update_decorrelation(model, eta=0.01)
    assert shares.keys() == {"experts.0", "experts.1"}
    assert torch.equal(model.experts[2].decorrelation.R, torch.eye(4))
    one = model.experts[1].decorrelation.R
    assert shares["experts.1"] < 1 and not torch.equal(one, torch.eye(4))
    assert torch.linalg.matrix_norm(one, 2) < 2


# ---- which layers ----


def test_block_inputs_are_what_normalisations_feed():
    model, batch = made("SwinModel")
    decorrelate(model, "block_inputs", batch=batch)
    leaves = {name.split(".")[-1] for name, _ in decorrelated_layers(model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "fc1", "reduction"}


def test_the_criterion_weighs_correlation_width_and_tokens():
    def pays(**changed):
        return LayerInput(["x"], **({"features": 64, "outputs": 192, "tokens": 4096, "rows": 128} | changed)).pays()

    assert pays(correlation=0.2)
    assert not pays(correlation=1 / 128)  # what noise shows
    assert not pays(correlation=0.2, tokens=100)
    assert not pays(correlation=0.2, outputs=4)
    assert not pays(correlation=0.2, features=2048, outputs=2048)
    assert LayerInput(["x"], 64, 192, 4096, rows=128, correlation=0.2).cost() == pytest.approx(
        2 * 64 / (3 * 4096) + 2 * 64 * (409.6 + 473.6) / 5 / (6 * 4096 * 192)  # an update every 5 steps
    )


class Wide(nn.Module):
    """Layers on a correlated and on an uncorrelated input."""

    def __init__(self):
        super().__init__()
        self.correlated, self.plain = nn.Linear(16, 64), nn.Linear(16, 64)

    def forward(self, x, y):
        return self.correlated(x) + self.plain(y)


def test_auto_takes_the_correlated_layer_and_prints_the_table(capsys):
    torch.manual_seed(0)
    batch = torch.randn(4000, 16) @ torch.randn(16, 16), torch.randn(4000, 16)
    model = Wide()
    before = repr(model)
    inputs = survey_layers(model, batch)
    assert repr(model) == before and model.training
    assert all(one.rows == 32 for one in inputs)
    decorrelate(model, batch=batch)
    assert [name for name, _ in decorrelated_layers(model)] == ["correlated"]
    assert capsys.readouterr().out == linear_table(inputs, {"correlated"}) + "\n"
    assert isinstance(model.correlated, SharingLayer)


def test_refusals():
    model, batch = Wide(), (torch.randn(4, 16), torch.randn(4, 16))
    with pytest.raises(ValueError, match=r"auto, all, block_inputs or a predicate.*'encoder'"):
        decorrelate(model, "encoder", batch=batch)
    with pytest.raises(ValueError, match=r"none of the linear layers of Wide(.|\n)*correlated(.|\n)*no"):
        decorrelate(model, batch=batch)  # too few tokens
    decorrelate(model, "all", batch=batch)
    with pytest.raises(ValueError, match=r"Wide is already decorrelated; hf_dbp\.fuse"):
        decorrelate(model, "all", batch=batch)
    with pytest.raises(ValueError, match="itself a layer"):
        decorrelate(nn.Linear(2, 2), "all", batch=torch.randn(3, 2))


# ---- traps ----


class Reads(nn.Module):
    """Code that reads a layer's weight in one of many ways, beside calling the layer."""

    WAYS: ClassVar[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "linear": nn.functional.linear, "keyword": lambda x, w: nn.functional.linear(x, weight=w),
        "T": lambda x, w: x @ w.T, "mT": lambda x, w: x @ w.mT, "H": lambda x, w: x @ w.H,
        "data": lambda x, w: x @ w.data, "t": lambda x, w: x @ w.t(), "detach": lambda x, w: x @ w.detach(),
        "norm": lambda x, w: x * w.norm(), "dtype": lambda x, w: x.to(w.dtype), "shape": lambda x, w: x * w.shape[0],
    }  # fmt: skip

    def __init__(self, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + self.WAYS[self.way](x, self.layer.weight)


@pytest.mark.parametrize("way", Reads.WAYS)
def test_a_weight_that_other_code_reads_stays_plain_however_it_is_read(way):
    (found,) = probe(Reads(way), torch.randn(3, 4))
    assert ("other code reads its weight" in found.plain) == (way not in ("dtype", "shape"))


class Listed(nn.Module):
    """It calls layers through a list of its own, as MaskFormer does; a swap does not reach them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = [self.second]

    def forward(self, x):
        return self.calls[0](self.first(x))


class SentTo(nn.Module):
    """Experts that are called even without tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert):
        return sum(layer(x[expert == i]).sum() for i, layer in enumerate(self.experts))


def test_layers_held_in_a_list_stay_plain_and_experts_without_tokens_share_nothing():
    found = {one.names[0]: one.plain for one in probe(Listed(), torch.randn(3, 4))}
    assert not found["first"] and "in a list" in found["second"]
    groups = [one.names for one in probe(SentTo(), (torch.randn(5, 4), torch.zeros(5)))]
    assert groups == [["experts.0"], ["experts.1"], ["experts.2"]]


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1}, {"stride": 1}, {"kernel_size": 1, "stride": 1}])
def test_a_convolution_that_is_no_patch_projection_stays_plain(options):
    conv = nn.Conv2d(3, 4, **({"kernel_size": 2, "stride": 2} | options))
    (found,) = probe(nn.Sequential(conv), torch.randn(2, 3, 8, 8))
    assert bool(found.plain) == ("kernel_size" not in options)


def test_inputs_without_a_batch_count_as_one():
    for layer, x in ((nn.Linear(4, 4), torch.randn(4)), (nn.Conv2d(3, 4, 2, stride=2), torch.randn(3, 8, 8))):
        model = nn.Sequential(layer)
        expected = model(x)
        decorrelate(model, "all", batch=x)
        configure_sampling(model, ALL_ROWS)
        assert torch.equal(model.train()(x), expected)
        assert len(model[0].decorrelation.rows) == (1 if x.ndim == 1 else 16)
    with pytest.raises(ValueError, match="none of the linear layers"):
        decorrelate(nn.Sequential(nn.ReLU()), "all", batch=torch.randn(2, 2))


def test_a_layer_frozen_after_the_swap_keeps_its_r():
    model, x = Shared(), torch.randn(6, 4)
    decorrelate(model, "all", batch=x)
    configure_sampling(model, ALL_ROWS)
    model.b.weight.requires_grad_(False)  # shares its R with a
    model.train()(x)
    shares = update_decorrelation(model, eta=0.1)
    assert shares.keys() == {"c", "d", "e", "f", "again"}
    assert torch.equal(model.a.decorrelation.R, torch.eye(4))
    assert not torch.equal(model.c.decorrelation.R, torch.eye(4))


@pytest.mark.parametrize("saved", ["all", "query", "key", "value", "key value", "none"])
@pytest.mark.parametrize("chosen", ["query", "key", "value", "key value", "query key value"])
def test_a_checkpoint_of_another_choice_of_layers_gives_the_same_outputs_or_an_error(saved, chosen):
    def choice(words):
        return lambda _, name: name.split(".")[-1] in words.split()

    def model_of(words):
        model, batch = made("BertForMaskedLM")
        return decorrelate(model, choice(words) if words != "all" else "all", batch=batch)

    source, batch = (model_of(saved) if saved != "none" else made("BertForMaskedLM")[0]), zoo.text()
    if saved != "none":
        disturb(source)
    model = model_of(chosen)
    disturb(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    try:
        model.load_state_dict(source.state_dict(), strict=False)
    except RuntimeError as error:
        assert "shares its R with other layers here, but not in the checkpoint" in str(error)
        assert saved in ("query", "key") and len(chosen) > len(saved)
    else:
        torch.testing.assert_close(zoo.output(model.eval(), batch), zoo.output(source.eval(), batch))


def test_r_is_never_in_low_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = decorrelate(nn.Sequential(nn.Linear(4, 4)), "all", batch=torch.randn(3, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[0].decorrelation.R.dtype == torch.float32


class Masked(nn.Module):
    """A part with a mask of its own, which may be None, inside a model with a mask."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            return self.linear(x)

    def __init__(self):
        super().__init__()
        self.part = self.Part()

    def forward(self, x, attention_mask=None, key_padding_mask=None, inner=None):
        return self.part(x, attention_mask if inner is None else inner(attention_mask))


def rows_of(model, **inputs):
    model.part.linear.decorrelation.rows = None
    model.train()(**inputs)
    rows = model.part.linear.decorrelation.rows
    return rows if rows is None else len(rows)


def test_every_kind_of_mask_tells_tokens_from_padding():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    model = decorrelate(Masked(), "all", batch={"x": x})
    configure_sampling(model, ALL_ROWS)
    added = (1.0 - mask) * -1e4
    for given in (mask, mask.bool(), mask.float(), added):
        assert rows_of(model, x=x, attention_mask=given) == 4
        assert rows_of(model, x=x, attention_mask=mask, inner=lambda _, given=given: given) == 4  # type: ignore[misc]
    assert rows_of(model, x=x, attention_mask=torch.zeros(2, 3)) == 6  # added to scores, no padding
    assert rows_of(model, x=x, attention_mask=mask, inner=lambda _: None) == 6  # another sequence as long
    assert rows_of(model, x=x, attention_mask=mask, inner=lambda _: added[:, None, None]) == 4
    assert rows_of(model, x=x, attention_mask=added[:, None, None]) is None  # the user's own: not told from padding
    block = nn.ModuleDict({"linear": nn.Linear(4, 4)})
    block.forward = lambda x, key_padding_mask=None: block["linear"](x)  # type: ignore[method-assign]
    decorrelate(block, "all", batch=(x,))
    configure_sampling(block, ALL_ROWS)
    block(x, key_padding_mask=mask == 0)
    assert len(block["linear"].decorrelation.rows) == 4
    found = probe(Masked(), {"x": x, "attention_mask": torch.zeros_like(mask)})
    assert found[0].plain == "its mask calls every row of its input padding"


def test_masks_survive_an_interrupted_forward_and_a_survey():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    model = decorrelate(Masked(), "all", batch={"x": x})
    configure_sampling(model, ALL_ROWS)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(x=x, attention_mask=mask, inner=interrupt)
    assert model.part.linear.decorrelation.padding.masks and rows_of(model, x=x) == 6
    with pytest.raises(ValueError, match="Masked is already decorrelated"):
        survey_layers(model, {"x": x})
    probe(model, {"x": x})
    assert rows_of(model, x=x, attention_mask=mask) == 4


@pytest.mark.parametrize("title", ["T5ForConditionalGeneration"])
def test_the_encoders_mask_says_nothing_about_a_decoder_of_the_same_length(title):
    model, batch = decorrelated(title)
    batch["labels"] = torch.randint(2, 50, batch["input_ids"].shape)
    model.train()(**batch)
    rows = {name: len(d.rows) for name, d in decorrelations(model) if name.startswith("decoder")}
    cross = {name for name in rows if name.endswith("EncDecAttention.k")}
    assert cross and {rows[name] for name in cross} == {sum(zoo.LENGTHS)}
    assert {rows[name] for name in rows.keys() - cross} == {batch["labels"].numel()}


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, x):
        return self.linear(x + torch.randn_like(x))


def test_the_probe_leaves_the_random_numbers_as_they_were():
    model, x = Drawing(), torch.randn(4000, 8) @ torch.randn(8, 8)
    before = torch.get_rng_state()
    decorrelate(model, "auto", batch=x)
    assert torch.equal(torch.get_rng_state(), before)
