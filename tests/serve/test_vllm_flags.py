import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.command import vllm_command
from serve.profiles import load_profile, profile_names

PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsed = []
for flags in json.loads(sys.argv[1]):
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(arguments)
    fused = arguments.compilation_config.pass_config.fuse_allreduce_rms
    parsed.append([arguments.speculative_config, arguments.default_chat_template_kwargs, fused])
print(json.dumps(parsed))
"""


@pytest.mark.engine
def test_the_pinned_vllm_takes_the_flags_of_each_profile():
    names = profile_names()
    commands = [
        vllm_command(load_profile(name), Path("/model"), "127.0.0.1", 8000, 1) for name in names
    ]
    flags = [command[command.index("--model") :] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(flags)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    given = [{"method": "mtp", "num_speculative_tokens": 1}, {"thinking": False}]
    fused = [False if load_profile(name).tensor_parallel_size > 1 else None for name in names]
    assert False in fused
    assert json.loads(done.stdout.splitlines()[-1]) == [[*given, each] for each in fused]
