"""The output head against whole logits in float64, and how often a quantised one is unpacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite_dil.backends.torch import head as torch_head
from lite_dil.backends.torch.head import QuantizedHead, token_hits, token_logps
from lite_dil.models.logits import LogitTransform

WIDTH, VOCABULARY, TOKENS = 64, 200, 45


def made(bits: int | None, vocabulary: int = VOCABULARY) -> tuple[Any, Tensor]:
    """A head with a bias, and the weight that it computes with."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, vocabulary).requires_grad_(False)
    head.weight.normal_()
    head.bias[:64] = -torch.inf  # of the first tile, as where a model forbids tokens
    if bits is None:
        return head, head.weight
    small = QuantizedHead(head, bits, torch.float32, torch.device("cpu"))
    return small, torch.cat([weight for _, weight in small.tiles()])


def hidden_and_targets(tokens: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(tokens, WIDTH, generator=draw), torch.randint(64, vocabulary, (tokens,), generator=draw)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles, the last of 8 tokens, for chunks of 16 hidden states, of which two and the rest make a block."""
    monkeypatch.setattr(torch_head, "HEAD_TILE", 64)
    monkeypatch.setattr(torch_head, "TORCH_CHUNK", {"cpu": 64 * 16})
    monkeypatch.setattr(torch_head, "HEAD_SUMS", WIDTH * 37)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(1.5, 6.0)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_log_probs_and_gradients_are_those_of_whole_logits(
    bits: int | None, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    head, weight = made(bits)
    hidden, targets = hidden_and_targets(TOKENS)
    upstream = torch.linspace(-1, 2, TOKENS)

    x = hidden.clone().requires_grad_()
    logps = token_logps(x, head, targets, transform)
    logps.backward(upstream)

    wide = hidden.double().requires_grad_()
    logits = transform.scale * (wide @ weight.double().T + head.bias.double())
    if transform.cap:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected.backward(upstream.double())

    assert x.grad is not None and wide.grad is not None
    # Float32 sums of 200 terms: their rounding is a few 2^-24 of the largest term.
    torch.testing.assert_close(logps.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(token_logps(hidden, head, targets, transform), logps)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiles_change_no_more_than_rounding(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the head that is not quantised, whose logits are all there at once, on the same weight."""
    small_pieces(monkeypatch)
    head, weight = made(bits)
    whole, _ = made(None)
    whole.weight.copy_(weight)
    hidden, targets = hidden_and_targets(TOKENS)
    found = []
    for each in (head, whole):
        x = hidden.clone().requires_grad_()
        logps = token_logps(x, each, targets, LogitTransform())
        logps.sum().backward()
        found.append((logps.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=1e-5)


def test_a_quantised_head_is_unpacked_once_however_many_tokens_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_head, "HEAD_TILE", 64)
    monkeypatch.setattr(torch_head, "TORCH_CHUNK", {"cpu": 64 * 16})
    head, _ = made(8)
    unpack, calls = head.unpack, []
    head.unpack = lambda *args: calls.append(1) or unpack(*args)
    for tokens in (5, 50, 500):
        hidden, targets = hidden_and_targets(tokens)
        token_logps(hidden.requires_grad_(), head, targets, LogitTransform()).sum().backward()
        assert len(calls) == len(head.packed) == 4
        calls.clear()


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.5, 6.0)])
@pytest.mark.parametrize("bits", [None, 8])
def test_hits_are_the_argmax_of_whole_logits(
    bits: int | None, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles and chunks; of equal logits the first one counts."""
    small_pieces(monkeypatch)
    head, weight = made(bits)
    hidden, targets = hidden_and_targets(TOKENS)
    best = (hidden @ weight.T + head.bias).argmax(-1)
    targets[::2] = best[::2]
    logps = token_logps(hidden, head, targets, transform)
    found = token_hits(hidden, head, targets, transform)
    assert torch.equal(found[:, 0], logps) and 0 < found[:, 1].sum() < TOKENS
    assert torch.equal(found[:, 1].bool(), targets == best)

    same = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    same.weight.zero_()
    assert token_hits(hidden[:3], same, torch.tensor([0, 1, 199]), transform)[:, 1].tolist() == [1.0, 0.0, 0.0]
