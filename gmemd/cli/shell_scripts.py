"""gmemctl's completion for bash, zsh and fish, derived from its parser; the server is asked for ids and commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from gmemd.cli.parser import first_words, inner_verbs, options_of, values_of, verbs_of, words_of


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell, to be sourced; zsh reads that of bash."""
    if shell == "fish":
        return _fish(parser)
    return "autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh") + _bash(parser)


def _flags(parser: argparse.ArgumentParser) -> str:
    return " ".join(flag for action in options_of(parser) for flag in action.option_strings)


def _with_value(parser: argparse.ArgumentParser) -> str:
    """A pattern of all options that take a value."""
    parsers = [parser, *verbs_of(parser).values()]
    return "|".join(dict.fromkeys(flag for one in parsers for action in options_of(one) if action.nargs != 0
                                  for flag in action.option_strings))


def _asked(words: Iterable[str], opening: str = "$(") -> str:
    """These words in the form for a shell."""
    return " ".join(f"{opening}gmemctl completion {word[1:-1]} 2>/dev/null)" if word.startswith("<") else word
                    for word in words)


def _bash(parser: argparse.ArgumentParser) -> str:
    values = {"|".join(action.option_strings): _asked(values_of(action))
              for one in (parser, *verbs_of(parser).values()) for action in options_of(one)}
    choices = "\n".join(f'        {flags}) COMPREPLY=($(compgen -W "{words}" -- "$current")); return ;;'
                        for flags, words in values.items() if words)
    groups = _groups(parser)
    known = {group: " ".join(inner) for group, inner in groups.items()} | {
        name.replace(" ", "' '"): " ".join(filter(None, (_flags(sub), _asked(words_of(sub)))))
        for name, sub in verbs_of(parser).items()}
    verbs = "\n".join(f'        {name}) known="{words}" ;;' for name, words in known.items())
    return f"""# gmemctl's completion: source <(gmemctl completion bash), or zsh
_gmemctl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb='' known='' i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in
            --) return ;;
            {_with_value(parser)}) ((i++)) ;;
            -*) ;;
            *) case $verb in {'|'.join(["''", *groups])}) verb=${{verb:+$verb }}${{COMP_WORDS[i]}} ;; esac ;;
        esac
    done
    case $before in
{choices}
        {_with_value(parser)}) COMPREPLY=($(compgen -f -- "$current")); return ;;
    esac
    case $verb in
        '') known='{_flags(parser)} {' '.join(first_words(verbs_of(parser)))}' ;;
{verbs}
    esac
    COMPREPLY=($(compgen -W "$known" -- "$current"))
}}
complete -o default -F _gmemctl gmemctl
"""


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = ["# gmemctl's completion for fish: gmemctl completion fish | source",
             "complete -c gmemctl -f"]
    lines += [_fish_option("", action) for action in options_of(parser)]
    groups = _groups(parser)
    for group, inner in groups.items():
        lines.append(f"complete -c gmemctl -n __fish_use_subcommand -a {group} -d {_quoted(', '.join(inner))}")
    outside = "".join(f"; and not __fish_seen_subcommand_from {group}" for group in groups)
    for name, sub in verbs_of(parser).items():
        group, _, last = name.rpartition(" ")
        before = f"__fish_seen_subcommand_from {group}" if group else "__fish_use_subcommand"
        seen = f"{before}; and __fish_seen_subcommand_from {last}" if group else \
            f"__fish_seen_subcommand_from {last}{outside}"
        condition = f"-n '{seen}' "
        lines.append(f"complete -c gmemctl -n {before if not group else _quoted(before)} -a {last} "
                     f"-d {_quoted(sub.description or '')}")
        lines += [_fish_option(condition, action) for action in options_of(sub)]
        lines += [f"complete -c gmemctl {condition}-a '{_asked([word], '(')}'" for word in words_of(sub)]
    return "\n".join(lines) + "\n"


def _fish_option(condition: str, action: argparse.Action) -> str:
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings)
    known = _asked(values_of(action), "(")
    value = "" if action.nargs == 0 else f" -x -a '{known}'" if known else " -r"
    return f"complete -c gmemctl {condition}{flags}{value} -d {_quoted(action.help or '')}"


def _groups(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The first words of verbs of two words, with the second ones."""
    verbs = verbs_of(parser)
    return {word: inner for word in first_words(verbs) if (inner := inner_verbs(word, verbs))}


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
