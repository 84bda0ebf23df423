import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The matrices are tiny: on a busy machine threads would wait for each other's turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
