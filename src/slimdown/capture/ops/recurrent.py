"""Recurrent layers: LSTM, GRU and the plain one, in several layers and both directions."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, concat, freeze_, product, unify_

NUM_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(call: Call) -> list[Shape]:
    """Input (T, N, C), or (N, T, C), to (T, N, directions · H), and the last states.

    The states of all layers and directions are one tensor, so all of them keep the same of the H
    hidden units. A unit without weights stays at zero: its gates are the same at every step, and
    what they let pass is zero.
    """
    if "input" not in call.names:
        raise Unsupported  # packed sequences
    x, parameters = call.shape("input"), call.argument("params")
    states = call.list_of_shapes("hx") if call.name == "lstm" else [call.shape("hx")]
    num_layers, directions = call.integer("num_layers"), 1 + bool(call.argument("bidirectional"))
    per_cell = 4 if call.argument("has_biases") else 2
    if (
        any(len(shape) != 3 for shape in (x, *states))
        or len(parameters) != per_cell * num_layers * directions
    ):
        raise Unsupported  # LSTMs with projections have one tensor more
    hidden = Var(states[0][-1].size)
    for state in states:  # (layers · directions, N, H)
        freeze_(state[0], call.name)
        unify_(state[1], x[0] if call.argument("batch_first") else x[1])
        unify_(state[2], hidden)
    source = x[-1]
    for layer in range(num_layers):
        for direction in range(directions):
            first = (layer * directions + direction) * per_cell
            _cell(call, parameters[first : first + per_cell], source, hidden, (x[0], x[1]))
        source = concat(*[hidden] * directions)
    return [(x[0], x[1], source), *states]


def _cell(
    call: Call, parameters: list[object], source: Dim, hidden: Dim, outer: tuple[Dim, Dim]
) -> None:
    """One direction of one layer: its gates are stacked along the first axis of each parameter."""
    gates = product(Var(NUM_GATES[call.name], call.name), hidden)
    shapes = [call.shape_of(parameter) for parameter in parameters]
    for parameter, shape, read in zip(parameters, shapes, (source, hidden), strict=False):
        if shape is None:
            raise Unsupported
        unify_(shape[1], read)
        call.cost(*outer, *shape)
        call.layer(parameter, hidden)
    for shape in shapes:
        if shape is None:
            raise Unsupported
        unify_(shape[0], gates)
