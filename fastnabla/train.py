"""`python -m fastnabla.train [PRESET] [--field value …]`: finetune a diffusion model. Without arguments: the testbed.

The command line is parsed before torch is imported, so that --help and a mistyped field are answered at once.
"""

import sys

import tyro

from fastnabla.config.fields import dotted
from fastnabla.config.methods import METHODS
from fastnabla.config.model_sections import TESTBED
from fastnabla.config.presets import PRESETS
from fastnabla.config.renamed import with_new_options
from fastnabla.config.train import TrainConfig
from fastnabla.distributed.launch import RankInfo, launch_notes
from fastnabla.utils.console import command_console, print_error, print_plain, quiet_libraries, silenced
from fastnabla.utils.hidden_packages import hidden_packages
from fastnabla.utils.quick_imports import quick_imports
from fastnabla.utils.require import require

PROGRAM = "python -m fastnabla.train"
DESCRIPTION = (
    "Finetune a diffusion model against a differentiable reward with residual ∇-DB. Without arguments: the testbed. "
    f"`{PROGRAM} {TESTBED} --help` explains every field."
)


def parse(arguments: list[str]) -> TrainConfig:
    """Parse a command line. Without a preset, the testbed's is used.

    The first ``--`` is dropped. torchrun needs one before our --run, which it would otherwise parse as its own option, and
    some versions of Python pass it on.

    Raises:
        ValueError: a setting has no effect on the method, lacks its section, or was renamed and has other values now.
        SystemExit: with a message, if an option or a value is not valid, or for --help.
    """
    if "--" in arguments:
        place = arguments.index("--")
        arguments = arguments[:place] + arguments[place + 1 :]
    arguments = with_new_options(arguments)
    _check_sections(arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [TESTBED, *arguments]
    name, *options = arguments
    if name not in PRESETS:
        return tyro.extras.overridable_config_cli(PRESETS, args=arguments, prog=PROGRAM, description=DESCRIPTION)
    description, preset = PRESETS[name]
    config = tyro.cli(
        TrainConfig,
        args=options,
        default=preset,
        prog=f"{PROGRAM} {name}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )
    given, before = dotted(config), dotted(preset)
    for field in METHODS[config.method].without:
        problem = f"has no effect on method = {config.method!r}; leave it out."
        require(given[field] == before[field], field, given[field], problem)
    return config


def _check_sections(arguments: list[str]) -> None:
    """Refuse an option without its section. The parser would propose only one of several sections.

    Raises:
        ValueError: the message names the options of all sections.
    """
    fields = dotted(TrainConfig())
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        name = option[2:].replace("-", "_")
        found = [f"--{field.replace('_', '-')}" for field in fields if field.endswith(f".{name}")]
        if found and name not in fields:
            raise ValueError(f"{option}: no such option; did you mean {' or '.join(found)}?")


def main(arguments: list[str]) -> int:
    """Run the command line in this process, together with the other ranks if there are several. Returns the exit status."""
    console = command_console()
    try:
        info = RankInfo.of()
        with silenced(info.rank > 0):
            config = parse(arguments)
            for note in launch_notes(info):
                print_plain(console, note, "yellow")
    except ValueError as error:
        print_error(error)
        return 2
    quiet_libraries()
    # torch and diffusers are imported here. diffusers and peft would import bitsandbytes, for quantised networks, which
    # imports torch's compiler, which takes two seconds. `fastnabla.optim` imports it for an 8-bit optimizer.
    with quick_imports(), hidden_packages("bitsandbytes"):
        from peft.import_utils import is_bnb_available

        from fastnabla.training.command import run_command

        is_bnb_available()  # peft remembers the answer

    return run_command(config, info)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
