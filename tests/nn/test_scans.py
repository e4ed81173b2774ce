"""Orders of a grid, written out by hand, and directions by layer."""

import pytest
import torch

from lba_exp.nn.attention import LinearAttention
from lba_exp.nn.scans import direction_of_layer, scan_order

ORDERS = {
    # a grid of 3 rows and 2 columns:  0 1 / 2 3 / 4 5
    "raster": [0, 1, 2, 3, 4, 5],
    "snake": [0, 1, 3, 2, 4, 5],
    "snake_transposed": [0, 2, 4, 5, 3, 1],
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_and_the_class_token_first(name):
    assert scan_order(name, (3, 2), class_token=False).tolist() == ORDERS[name]
    assert scan_order(name, (3, 2), class_token=True).tolist() == [0, *(place + 1 for place in ORDERS[name])]


@pytest.mark.parametrize("name", ["snake", "snake_transposed"])
def test_neighbours_in_a_snake_are_neighbours_on_the_grid(name):
    order = scan_order(name, (5, 7), class_token=False)
    assert sorted(order.tolist()) == list(range(35))
    steps = (order[1:] // 7 - order[:-1] // 7).abs() + (order[1:] % 7 - order[:-1] % 7).abs()
    assert (steps == 1).all()


def test_directions_alternate_by_layer():
    assert [direction_of_layer("alternating", n) for n in range(4)] == ["forward", "backward", "forward", "backward"]
    assert direction_of_layer("both", 3) == "both"


def test_transposing_the_image_changes_the_roles_of_the_two_scans():
    """With the gates exchanged, the transposed image gives the transposed output."""
    torch.manual_seed(0)
    layer = LinearAttention(8, 2, scan="multi", grid=(3, 3)).double()
    for parameter in (*layer.gate.parameters(), *layer.gate2.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    transposed = torch.arange(9).view(3, 3).T.flatten()
    y = layer(x)
    layer.gate, layer.gate2 = layer.gate2, layer.gate
    torch.testing.assert_close(layer(x[:, transposed]), y[:, transposed])
    layer.gate, layer.gate2 = layer.gate2, layer.gate
    assert not torch.allclose(layer(x[:, transposed]), y[:, transposed])


def test_orders_are_no_part_of_the_weights_and_follow_the_layer():
    layer = LinearAttention(8, 2, scan="snake", grid=(2, 3))
    assert not any("orders" in name or "places" in name for name in layer.state_dict())
    assert layer.to("meta").orders.device.type == "meta"


def test_gradients_find_their_way_back_through_the_scans():
    torch.manual_seed(2)
    layer = LinearAttention(4, 2, scan="multi", grid=(3, 2), class_token=True).double()
    assert (layer.orders[1] != layer.places[1]).any(), "an order that undoes itself would tell nothing"
    for gate in (layer.gate, layer.gate2):
        torch.nn.init.normal_(gate.projection.weight)
    assert torch.autograd.gradcheck(layer, torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True))
