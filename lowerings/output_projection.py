"""Attention's way out: a matrix for each group of heads, then one for all of them."""

from typing import Any

from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.linear import few_and_stored, grouped_linear, linear, sizes_of
from dsv4_compile.op import Cost, Tensor, op


@op("dsv4::output_projection")
def output_projection(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None = None,
    a_scale_2: Tensor | None = None,
    b_scale: Tensor | None = None,
    b_scale_2: Tensor | None = None,
) -> Tensor:
    """`grouped_linear`, the groups side by side, `linear`.

    x [G, M, K], group by group; a [G R, K] and b [D, G R], plain, or as `dequantize` takes them with their scales ->
    [M, D] of x's dtype; what lies between may be rounded to it or not. On a CPU and for many tokens its parts are asked.
    Source: DeepSeek-V4, grouped output projection.
    """
    u = grouped_linear(x, a, a_scale, a_scale_2)
    return linear(u.transpose(0, 1).flatten(1), b, b_scale, b_scale_2)


@output_projection.cost
def _(M, G, K, R, D, a_bits, a_block, b_bits, b_block):
    a, b = G * R * K, D * G * R
    read = a * (a_bits / 8 + 1 / a_block) + b * (b_bits / 8 + 1 / b_block) + 2 * M * G * K
    return Cost(flops=(2 * M + 1) * (a + b), read=read, write=2 * M * D)


@output_projection.sizes
def _(a):
    (G, M, K), of_a, of_b = a.x.shape, sizes_of(a.a, a.a_scale), sizes_of(a.b, a.b_scale)
    kept = {f"{name}_{key}": of[key] for name, of in (("a", of_a), ("b", of_b)) for key in ("bits", "block")}
    return dict(M=M, G=G, K=K, R=of_a["N"] // G, D=of_b["N"], **kept)


def fits_the_kernel(a: Any) -> bool | str:
    """Both products must be of few vectors."""
    tokens = a.x.shape[1]
    for stored in ((a.a, a.a_scale, a.a_scale_2), (a.b, a.b_scale, a.b_scale_2)):
        if (fits := few_and_stored(a.x, tokens, *stored)) is not True:
            return fits
    return True


def pays(a: Any) -> bool | str:
    (G, M, K), dtype = a.x.shape, a.x.dtype
    first = gemv.shape_of(M, G, K, (a.a, a.a_scale, a.a_scale_2), dtype, dtype, by_token=True)
    second = gemv.shape_of(M, 1, len(a.a), (a.b, a.b_scale, a.b_scale_2), dtype, dtype)
    return gemv.pays(first, second, most=gemv.rows_of_launch(a.x, a.a_scale, a.b_scale))


@output_projection.on("cuda", arch="sm_90+", when=fits_the_kernel, worth=pays)
def _(x, a, b, a_scale, a_scale_2, b_scale, b_scale_2):
    """Attention leaves all groups of a token side by side, and the second product wants them so: nothing is moved."""
    u = gemv.multiply(x.transpose(0, 1), a, a_scale, a_scale_2, x.dtype, by_token=True)
    return gemv.multiply(u.flatten(1).unsqueeze(0), b, b_scale, b_scale_2, x.dtype).squeeze(0)
