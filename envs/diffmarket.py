"""The accounting step of `costs.account_step` in torch: differentiable, batched, on any device.

Gradients flow through orders, fills, every cost, carry and the weights held from bar to bar, so that a policy can be trained on
its own accounts. Prices are given: nobody's order moves them beyond its own impact cost, which is what makes these gradients
exact. The kernel stays the reference; a test holds the two together to 1e-9 in float64.

The equity after costs is the root of a convex function, found without gradients by the kernel's Newton iteration. One more
Newton step, this time with gradients, leaves the root where it is and has the derivative of the implicit function theorem
(Krantz & Parks 2002), -f_x / f_E: no iteration is kept for the backward pass. First derivatives only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from envs.costs import RECORD, RUIN, TRADABLE, UNTRADABLE, Costs, Execution

_MAX_ITERATIONS = 60  # as the kernel
_FIXED_ITERATIONS = 8  # on CUDA and where compiled, without asking after each whether it was the last


class Account(NamedTuple):
    """State of portfolios at a mark; `...` are any batch dimensions, such as (window, group)."""

    weights: Tensor  # (..., N) fractions of equity
    equity: Tensor  # (...) in units of the start
    peak: Tensor  # (...) running maximum of equity, its start included

    @property
    def drawdown(self) -> Tensor:
        """(...) 0 at a peak, then negative."""
        return self.equity / self.peak - 1.0


class Step(NamedTuple):
    account: Account  # at the next mark
    growth: Tensor  # (...) equity at the next mark over equity at this one; 0 or less where nothing was left; 1 once ruined
    record: dict[str, Tensor] | None  # (...) each, as in costs.RECORD, where asked for


class DiffMarket:
    """What `execution` and `costs` say about every bar, as tensors of `dtype` on `device`.

    smooth: below trades of about this size (a fraction of equity) the cost of a trade x rises with
    sqrt(x^2 + smooth^2) - smooth in place of |x|, which costs nothing at 0 too, never more, and has a gradient everywhere.
    0: |x|, exact.
    Raises ValueError for a negative or infinite `smooth`.
    """

    def __init__(self, execution: Execution, costs: Costs, smooth: float = 0.0, dtype=torch.float32, device="cpu"):
        if not 0.0 <= smooth < float("inf"):
            raise ValueError(f"smooth={smooth}: expected 0 or a positive number")
        self.smooth, self.costs, self.dtype, self.device = smooth, costs, dtype, torch.device(device)
        status = execution.status
        tables = [execution.to_fill, execution.to_mark, status != UNTRADABLE, status == TRADABLE]
        self._has_impact = execution.impact.shape == status.shape
        if self._has_impact:
            tables.append(execution.impact)
        # (T, K, N): one lookup per bar. A delisted symbol can only be closed: it is traded, to 0.
        self._tables = torch.stack([torch.as_tensor(x).to(device, dtype) for x in tables], dim=1)
        self._years = torch.as_tensor(execution.years).to(device, dtype)
        self._fill_at_end = execution.fill_at_end
        rates = costs.rates[0]
        self._rates = {name: float(rates[name]) for name in rates.dtype.names}
        self._linear = sum(self._rates[name] for name in ("commission", "spread", "slippage", "linear_impact"))
        self._quadratic = self._rates["quadratic_impact"]
        self._free = self._linear == self._quadratic == 0.0 and not self._has_impact
        self._carry = any(self._rates[name] != 0.0 for name in ("borrow", "financing", "cash"))

    @property
    def num_symbols(self) -> int:
        return self._tables.shape[2]

    def account(self, *batch: int) -> Account:
        """All in cash, equity 1."""
        one = torch.ones(batch, dtype=self.dtype, device=self.device)
        return Account(torch.zeros((*batch, self.num_symbols), dtype=self.dtype, device=self.device), one, one)

    def step(self, account: Account, target: Tensor, rows: Tensor, record: bool = False) -> Step:
        """One bar of money: trade from the weights held to `target` (..., N), then hold to the next mark.

        rows: (...) int64, the bar at which each order is decided, or of a shape that broadcasts, such as (window, 1). An
        account that is ruined (equity <= RUIN) holds nothing and stays as it is; the equity of one that is ruined now becomes
        what the kernel makes of it. Raises ValueError for orders of another number of symbols.
        """
        if target.shape[-1] != self.num_symbols:
            raise ValueError(f"target: {target.shape[-1]} weights; expected one for each of {self.num_symbols} symbols")
        fill, mark, can_trade, open_, *impact = self._tables[rows].unbind(-2)
        alive = account.equity > RUIN
        weights = account.weights
        drifted = weights * (1.0 + fill)
        at_fill = 1.0 + (weights * fill).sum(-1)
        target = target * open_
        # below RUIN nothing comes of it, but the root of 0 has no gradient
        root = impact[0] * account.equity.clamp(min=RUIN).sqrt().unsqueeze(-1) if impact else None
        has_equity = at_fill > 0.0
        per_equity = torch.where(has_equity, 1.0 / torch.where(has_equity, at_fill, 1.0), 0.0)
        quadratic = (self._quadratic * per_equity).unsqueeze(-1)
        after, solvable = at_fill, has_equity
        if not self._free:
            after, solvable = self._after_costs(at_fill, drifted, target, can_trade, quadratic, root)

        # What is left of a ruined account is closed where it can be; what cannot be is written off at the fill.
        trade = can_trade * (target * torch.where(solvable, after, 0.0).unsqueeze(-1) - drifted)
        size = self._size(trade)
        turnover = size.sum(-1)
        impact_cost = self._impact(size, quadratic, root).sum(-1) + self._rates["linear_impact"] * turnover
        spent = {name: self._rates[name] * turnover for name in ("commission", "spread", "slippage")} if record else {}
        after = at_fill - (self._linear - self._rates["linear_impact"]) * turnover - impact_cost
        held = drifted + trade
        profit = torch.where(solvable, (held * mark).sum(-1), 0.0)
        growth = after + profit
        carried = dict.fromkeys(("borrow", "financing", "interest"), torch.zeros_like(at_fill))
        if self._carry:
            carrying, base = (weights, torch.ones_like(after)) if self._fill_at_end else (held, after)
            gross, years = carrying.abs().sum(-1), torch.where(solvable, self._years[rows], 0.0)
            carried["borrow"] = self._rates["borrow"] * years * (-carrying).clamp(min=0.0).sum(-1)
            carried["financing"] = self._rates["financing"] * years * (gross - base).clamp(min=0.0)
            carried["interest"] = self._rates["cash"] * years * (base - gross).clamp(min=0.0)
            growth = growth - carried["borrow"] - carried["financing"] + carried["interest"]

        kept = solvable & (growth > 0.0) & alive
        weights = held * (1.0 + mark) * torch.where(kept, 1.0 / torch.where(kept, growth, 1.0), 0.0).unsqueeze(-1)
        growth = torch.where(alive, growth, 1.0)
        equity = account.equity * growth
        following = Account(weights, equity, torch.maximum(account.peak, equity))
        if not record:
            return Step(following, growth, None)
        exposure = torch.where(after > 0.0, 1.0 / torch.where(after > 0.0, after, 1.0), 0.0)
        values = {
            "net_return": growth - 1.0, "gross_return": at_fill - 1.0 + profit, **spent, "impact": impact_cost, **carried,
            "turnover": turnover * per_equity,
            "gross_exposure": held.abs().sum(-1) * exposure, "net_exposure": held.sum(-1) * exposure,
        }  # fmt: skip
        values = {name: torch.where(alive, value, 0.0) for name, value in values.items()} | {"equity": equity}
        return Step(following, growth, {name: values[name] for name in RECORD})

    def hold(self, targets: Tensor, rows: Tensor, account: Account | None = None) -> tuple[Account, Tensor, dict[str, Tensor]]:
        """Order targets[..., t, :] (..., H, N) at rows[..., t] (..., H), one bar after another, whatever the account does.

        Returns the last account, growth (..., H) and the record, (..., H) each. Starts in cash unless an account is given.
        Raises ValueError as `step` does, and where rows and orders differ in number.
        """
        if rows.shape[-1] != targets.shape[-2]:
            raise ValueError(f"rows: {rows.shape[-1]} of them for orders at {targets.shape[-2]} bars; expected as many")
        account = self.account(*targets.shape[:-2]) if account is None else account
        steps = []
        for t in range(targets.shape[-2]):
            steps.append(self.step(account, targets[..., t, :], rows[..., t], record=True))
            account = steps[-1].account
        record = {name: torch.stack([step.record[name] for step in steps], dim=-1) for name in RECORD}
        return account, torch.stack([step.growth for step in steps], dim=-1), record

    def _size(self, trade):
        if self.smooth == 0.0:
            return trade.abs()
        square = trade * trade
        return square / ((square + self.smooth**2).sqrt() + self.smooth)  # sqrt(x^2 + d^2) - d without cancellation

    def _impact(self, size, quadratic, root):
        cost = quadratic * size * size
        return cost if root is None else cost + root * size**1.5

    def _after_costs(self, at_fill, drifted, target, can_trade, quadratic, root):
        """(...) equity after costs, differentiable, and (...) bool whether there is any: see costs.account_step."""
        with torch.no_grad():
            after, solvable = at_fill.clone(), at_fill > 0.0
            tolerance = max(1e-11, 2.0 * torch.finfo(at_fill.dtype).eps) * at_fill
            fixed = at_fill.is_cuda or torch.compiler.is_compiling()
            for _ in range(_FIXED_ITERATIONS if fixed else _MAX_ITERATIONS):
                trade = can_trade * (target * after.unsqueeze(-1) - drifted)
                size = self._size(trade)
                side = trade.sign() if self.smooth == 0.0 else trade / (trade * trade + self.smooth**2).sqrt()
                marginal = self._linear + 2.0 * quadratic * size
                if root is not None:
                    marginal = marginal + 1.5 * root * size.sqrt()
                slope = 1.0 + (can_trade * target * side * marginal).sum(-1)
                f = after - at_fill + (self._linear * size + self._impact(size, quadratic, root)).sum(-1)
                solvable = solvable & (slope > 0.0)
                move = torch.where(solvable, f / slope, 0.0)
                after = after - move
                solvable = solvable & (after > 0.0)
                if not fixed and (move.abs() <= tolerance).all():
                    break
            slope = torch.where(solvable, slope, 1.0)
        size = self._size(can_trade * (target * after.unsqueeze(-1) - drifted))
        f = after - at_fill + (self._linear * size + self._impact(size, quadratic, root)).sum(-1)
        return after - f / slope, solvable


def deleverage(target: Tensor, cap: Tensor) -> Tensor:
    """Weights (..., N) scaled down to a sum of |weights| of at most `cap` (...), such as one that is lower overnight."""
    return target * (cap / target.abs().sum(-1).clamp(min=1e-12)).clamp(max=1.0).unsqueeze(-1)
