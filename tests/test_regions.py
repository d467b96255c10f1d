"""Region bodies that take float8_e8m0fnu scales and write to their arguments compile with Inductor."""

import torch

E8M0 = torch.float8_e8m0fnu


@torch.compiler.nested_compile_region
def layer(x, ring, scale):
    ring.copy_(ring + x.sum())
    return (x * scale.to(torch.float32)).relu() + ring


def model(x, rings, scales):
    for ring, scale in zip(rings, scales, strict=True):
        x = layer(x, ring, scale)
    return x


def inputs():
    scales = [torch.full((4,), 2.0**i).to(E8M0) for i in range(3)]
    return torch.arange(4.0), [torch.zeros(4) for _ in range(3)], scales


def test_body_called_several_times():
    x, rings, scales = inputs()
    compiled = torch.compile(model, backend="dsv4", fullgraph=True)
    with torch.inference_mode():
        result = compiled(x, rings, scales)
        again, expected_rings, _ = inputs()
        torch.testing.assert_close(result, model(again, expected_rings, scales))
    torch.testing.assert_close(rings, expected_rings)


def test_each_scale_is_viewed_once(rewritten):
    x, rings, scales = inputs()
    with torch.inference_mode():
        result, _ = rewritten(lambda *a: model(*a) + model(*a), x, rings, scales)
        again, expected_rings, _ = inputs()
        torch.testing.assert_close(result, model(again, expected_rings, scales) + model(again, expected_rings, scales))
