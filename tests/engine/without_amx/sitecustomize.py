"""On PYTHONPATH, makes this machine look like an AVX2-only one to torch.cpu, hence to vLLM.

vLLM then loads `_C_AVX2`, which lacks the DeepSeek-V4 ops. Python imports this module at start,
in every process that vLLM spawns.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys

HIDDEN = ("avx512", "amx", "vnni")


class _HideFeatures(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for attribute in vars(module):
                if attribute.startswith("_is_") and any(f in attribute for f in HIDDEN):
                    setattr(module, attribute, lambda: False)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _HideFeatures())
