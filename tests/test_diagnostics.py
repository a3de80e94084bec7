"""Jacobian norms and ablations: against formulas, on both kinds of latent, and what must stay as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.ablation import Ablation, ablate
from lbi_compile.diagnostics import _norms_of, interface_jacobian, jacobian_norms, kinds_of
from lbi_compile.errors import BatchCouplingError, OptionError
from lbi_compile.interfaces import Latents
from tests.cases import in_float64
from tests.hooked_models import Branching
from tests.models import BatchNormMLP


def bounded_of(interface: str, **options: object) -> tuple[Tensor, BoundedModule]:
    model, x = in_float64("transformer", depth=4)
    assert isinstance(x, Tensor)
    model.eval()
    return x, lbi_compile.transform(model, x, regions=4, r=8, interface=interface, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("interface", ["token", "token+chunked"])
def test_norms_of_linear_cells_are_those_of_their_matrices(interface: str) -> None:
    x, bounded = bounded_of(interface, cell="linear")
    state = torch.get_rng_state()
    found = jacobian_norms(bounded, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.latent for one in found] == (["chunk", "token"] if "+" in interface else ["latent"])
    cells = [p.detach() for name, p in bounded.interface.named_parameters() if name.endswith(".A")]
    token = found[-1]
    assert token.first == 1
    assert token.norms == pytest.approx([float(torch.linalg.matrix_norm(A, 2)) for A in cells])
    whole = float(torch.linalg.matrix_norm(cells[1] @ cells[0], 2))
    assert token.products == pytest.approx([token.norms[-1], whole])
    if "+" in interface:
        # no gate of the token latent, which decays with depth, can be mistaken for that of the chunks
        assert (found[0].first, len(found[0].norms)) == (0, 3)
        before, after = (bounded.forward_regions(x)[1].m[k].chunk for k in (1, 2))
        assert before.shape == after.shape == (x.shape[0], 8)


def test_norms_are_refused_where_samples_mix() -> None:
    x = torch.randn(6, 10)
    bounded = lbi_compile.transform(BatchNormMLP(10, width=12, depth=4), x, regions=3, r=4, backward="chain")
    with pytest.raises(BatchCouplingError):
        jacobian_norms(bounded, x)


def picked(found: tuple[Ablation, ...], way: str, boundary: int | None) -> Ablation:
    (one,) = [one for one in found if (one.way, one.boundary) == (way, boundary)]
    return one


@pytest.mark.parametrize("interface", ["token", "token+chunked"])
def test_spoiled_latents_change_what_hears_them(interface: str) -> None:
    x, bounded = bounded_of(interface)

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    weights = {name: p.clone() for name, p in bounded.named_parameters()}
    expected, state = bounded(x).detach(), torch.get_rng_state()
    found = ablate(bounded, x, loss=loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in bounded.named_parameters())
    assert torch.equal(bounded(x), expected)
    assert [(one.way, one.boundary) for one in found] == [
        (way, k) for k in (None, 1, 2, 3) for way in ("zeroed", "noised", "shuffled")
    ]
    assert all(one.change > 1e-4 for one in found)
    assert {one.loss_as_is for one in found} == {float(loss(expected))}
    assert ablate(bounded, x, loss=loss) == found

    # zeroed everywhere by hand: the decoders of linear layers then give their bias
    if interface == "token":
        with torch.no_grad():
            for name, p in bounded.interface.named_parameters():
                if name.startswith("decoders") and name.endswith("weight"):
                    p.zero_()
        by_hand = bounded(x).detach()
        zeroed = picked(found, "zeroed", None)
        assert zeroed.change == pytest.approx(float((by_hand - expected).norm() / expected.norm()))
        assert zeroed.loss == pytest.approx(float(loss(by_hand)))
        assert all(one.change == 0 for one in ablate(bounded, x))


def test_shuffling_gives_every_sample_what_another_one_said() -> None:
    x, bounded = bounded_of("token")
    alike = x[:1].expand(3, *x.shape[1:]).clone()
    found = ablate(bounded, alike)
    assert picked(found, "shuffled", None).change < 1e-12  # all samples say the same
    assert picked(found, "zeroed", None).change > 1e-4
    assert {one.way for one in ablate(bounded, x[:1])} == {"zeroed", "noised"}


def test_nothing_to_ablate_and_refusals() -> None:
    x, bounded = bounded_of("zero")
    assert ablate(bounded, x) == ()
    features = torch.randn(2, 4)
    hooked = lbi_compile.transform(Branching(), features, regions=2, r=4)
    for call in (lambda: ablate(hooked, features), lambda: lbi_compile.verify(hooked, features, ablate=True)):
        with pytest.raises(OptionError, match="cut by hooks"):
            call()


def test_verify_shows_ablations() -> None:
    x, bounded = bounded_of("token")
    report = lbi_compile.verify(bounded, x, engine="autograd", ablate=True)
    assert report.ok
    assert len(report.ablations) == 12
    page = str(report)
    assert "where latents are spoiled" in page
    assert " all " in page


def test_latents_by_kind_from_the_first_region_that_one_enters() -> None:
    a, b, c = (torch.full((1, 2), float(i)) for i in range(3))
    assert kinds_of([None, a, b]) == [("latent", 1, [a, b])]
    assert kinds_of([a, None, b]) == [("latent", 0, [a, b])]
    assert kinds_of([None, None]) == []
    chunk, token = kinds_of([Latents(None, a), Latents(b, c)])
    assert chunk == ("chunk", 0, [a, c])
    assert token == ("token", 1, [b])
    assert [name for name, *_ in kinds_of([None, Latents(None, a)])] == ["chunk"]


def test_a_jacobian_has_a_row_for_each_number_after() -> None:
    before = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    W = torch.randn(4, 4, dtype=torch.float64)
    J = interface_jacobian(torch.tanh(before @ W.T), before)
    slope = 1 - torch.tanh(before @ W.T).square()
    torch.testing.assert_close(J, (slope[..., None] * W).flatten(0, 1).detach())
    other = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(interface_jacobian(other * 2, before), torch.zeros(6, 4, 4, dtype=torch.float64))


def test_norms_need_two_latents_and_no_more_than_64_numbers() -> None:
    def latents(count: int, r: int) -> list[Tensor]:
        found = [torch.ones(2, r, dtype=torch.float64, requires_grad=True)]
        for k in range(1, count):
            found.append(found[-1] * torch.tensor([[1.0 + k], [-2.0 * k]], dtype=torch.float64))
        return found

    assert _norms_of("latent", 1, latents(1, 3)) is None
    assert _norms_of("latent", 1, latents(2, 65)) is None
    assert _norms_of("latent", 1, latents(2, 64)) is not None
    norms = _norms_of("latent", 1, latents(4, 3))
    assert norms is not None
    # factors 2, 3, 4 at one index, -2, -4, -6 at the other
    assert norms.norms == pytest.approx((2, 4, 6))
    assert norms.products == pytest.approx((6, 24, 48))
    assert (norms.latent, norms.first) == ("latent", 1)
