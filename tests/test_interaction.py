import pytest
import torch

from slipstream.model.interaction import DotInteraction, interaction_pairs


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("num_vectors", [1, 2, 6])
def test_products_and_gradients_equal_plain_pytorch(num_vectors, itself):
    vectors = torch.randn(5, num_vectors, 3, dtype=torch.double, requires_grad=True)
    pairs, pair_of = interaction_pairs(num_vectors, itself)
    got = DotInteraction.apply(vectors, pairs, pair_of, itself)
    matrix = vectors @ vectors.transpose(1, 2)
    row, column = torch.tril_indices(num_vectors, num_vectors, 0 if itself else -1)
    expected = matrix[:, row, column]
    torch.testing.assert_close(got, expected)
    if not expected.numel():
        return  # one vector has no pair
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((z * weights).sum(), vectors)[0] for z in (got, expected))
    )
