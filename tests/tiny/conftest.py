import pytest
import torch

from tiny import export
from tiny.config import TinyConfig
from tiny.model import DeepseekV4


@pytest.fixture(scope="session")
def tiny_config():
    return TinyConfig()


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory, tiny_config):
    """An untrained model, exported in the original layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "original"
    export.export(DeepseekV4(tiny_config), folder)
    return folder
