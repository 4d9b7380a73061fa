"""``orthoreg completion``: scripts for bash, zsh and fish, made of the commands themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Commands, formatter

MODELS = ("vgg", "resnet", "torchvision:", "timm:")
FILES = ("FILE", "PATH", "FOLDER", "MODEL", "DATA")
"""Metavars in whose place a file or folder may stand."""


@dataclass(frozen=True)
class Option:
    """One option, or the positional argument (no flags)."""

    flags: tuple[str, ...]
    help: str
    value: bool  # whether one follows
    words: tuple[str, ...]  # that may follow
    files: bool  # whether a file may follow


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    help: str
    options: tuple[Option, ...]
    argument: Option | None  # the positional one


def add(commands: Commands[Any]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes this command in your shell",
        description="Prints a completion script.\n\n"
        '  bash  eval "$(orthoreg completion bash)" in ~/.bashrc\n'
        '  zsh   eval "$(orthoreg completion zsh)" in ~/.zshrc, after compinit\n'
        "  fish  orthoreg completion fish > ~/.config/fish/completions/orthoreg.fish",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(work=lambda options: _completion(options, commands), lack="")


def _completion(options: argparse.Namespace, commands: Commands[Any]) -> None:
    print(SCRIPTS[options.shell](described(commands)))


def described(commands: Commands[Any]) -> list[Command]:
    """What argparse knows of the commands."""
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    found = []
    for name, parser in commands.choices.items():
        options = [_option(action) for action in parser._actions]
        arguments = [option for option in options if not option.flags]
        flagged = tuple(option for option in options if option.flags)
        found.append(Command(name, helps[name], flagged, arguments[0] if arguments else None))
    return found


def _option(action: argparse.Action) -> Option:
    text = (action.help or "").replace("%(default)s", str(action.default))
    metavar = str(action.metavar or "")
    words = tuple(str(choice) for choice in action.choices or ())
    dest = action.dest
    if metavar == "MODEL" or dest == "model":
        words, metavar = MODELS, "MODEL"
    elif metavar == "DATA" or dest == "data":
        words, metavar = ("digits",), "DATA"
    elif dest == "target":
        words = tuple(f"{name}=" for name in ("filters", "macs", "params", "latency", "memory"))
    elif dest == "device":
        words = ("auto", "cpu", "cuda")
    elif dest in ("criterion", "penalty"):
        words = _names(dest)
    files = metavar in FILES or action.type is Path or dest == "weights"
    return Option(tuple(action.option_strings), text, action.nargs != 0, words, files)


def _names(kind: str) -> tuple[str, ...]:
    if kind == "penalty":
        from ..experiment.settings import STRENGTHS

        return tuple(STRENGTHS)
    from ..pruning import CRITERIA

    return tuple(CRITERIA)


def bash(commands: Sequence[Command]) -> str:
    """The script for bash."""
    lines = [
        "_orthoreg() {",
        "  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        "  local command=${COMP_WORDS[1]} words= files=",
        '  if [[ $current == "=" ]]; then current=; fi  # bash takes --data=x apart',
        '  if [[ $previous == "=" ]]; then previous=${COMP_WORDS[COMP_CWORD-2]}; fi',
        "  if [[ $COMP_CWORD -eq 1 ]]; then",
        f'    words="{" ".join(command.name for command in commands)} --help"',
        '  else case "$command $previous" in',
    ]
    for command in commands:
        for option in command.options:
            if option.value:
                cases = "|".join(f'"{command.name} {flag}"' for flag in option.flags)
                lines.append(f"    {cases}) {_bash_words(option)};;")
    lines += ['    *) case "$command" in']
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        lines += [
            f"      {command.name}) if [[ $current == -* ]]; then words={_quoted(flags)};"
            f" else {_bash_words(command.argument)}; fi;;"
        ]
    lines += [
        "    esac;;",
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        '  if [[ -n $files ]]; then COMPREPLY+=($(compgen -f -- "$current")); fi',
        "  if [[ ${COMPREPLY[0]} == *[:=] ]]; then compopt -o nospace 2>/dev/null; fi",
        "}",
        "complete -o filenames -F _orthoreg orthoreg",
    ]
    return "\n".join(lines)


def _bash_words(option: Option | None) -> str:
    if option is None:
        return ":"
    return f"words={_quoted(' '.join(option.words))} files={'1' if option.files else ''}"


def zsh(commands: Sequence[Command]) -> str:
    """The script for zsh."""
    lines = [
        "#compdef orthoreg",
        "_orthoreg() {",
        "  local -a commands",
        "  commands=(",
        *(f"    {_quoted(f'{c.name}:{c.help}')}" for c in commands),
        "  )",
        "  if (( CURRENT == 2 )); then _describe command commands; return; fi",
        "  local command=$words[2]",
        "  shift words; (( CURRENT-- ))",
        '  case "$command" in',
    ]
    for command in commands:
        lines.append(f"    {command.name}) _arguments \\")
        lines += [f"      {spec} \\" for spec in _zsh_specs(command)]
        lines[-1] = lines[-1].removesuffix(" \\") + ";;"
    lines += [
        "  esac",
        "}",
        'if [[ $funcstack[1] == _orthoreg ]]; then _orthoreg "$@"; '
        "else compdef _orthoreg orthoreg; fi",
    ]
    return "\n".join(lines)


def _zsh_specs(command: Command) -> Iterator[str]:
    for option in command.options:
        text = option.help.replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")
        for flag in option.flags:
            value = f":value:{_zsh_values(option)}" if option.value else ""
            equals = "=" if option.value and flag.startswith("--") else ""
            yield _quoted(f"{flag}{equals}[{text}]{value}")
    if command.argument is not None:
        yield _quoted(f"1:argument:{_zsh_values(command.argument)}")


def _zsh_values(option: Option) -> str:
    words = " ".join(word.replace(":", r"\:") for word in option.words)
    if words and option.files:
        return f'{{compadd -S "" -- {words.replace(chr(92), "")}; _files}}'
    if words:
        return f"({words})"
    return "_files" if option.files else " "


def fish(commands: Sequence[Command]) -> str:
    """The script for fish."""
    lines = ["complete -c orthoreg -f"]
    lines += [
        f"complete -c orthoreg -n __fish_use_subcommand -a {c.name} -d {_quoted(c.help)}"
        for c in commands
    ]
    for command in commands:
        begin = f"complete -c orthoreg -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            parts = [begin]
            for flag in option.flags:
                name = flag.lstrip("-")
                parts.append(f"-{'l' if flag.startswith('--') else 's'} {name}")
            if option.value:
                parts.append("-r" if option.files else "-x")
                if option.files:
                    parts.append("-F")
            if option.words:
                parts.append(f"-a {_quoted(' '.join(option.words))}")
            lines.append(" ".join([*parts, f"-d {_quoted(option.help)}"]))
        if command.argument is not None:
            if command.argument.words:
                lines.append(f"{begin} -a {_quoted(' '.join(command.argument.words))}")
            if command.argument.files:
                lines.append(f"{begin} -F")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
