"""CUDA in the words of ``_cuda.h``: what g++ does not know is written anew.

An instruction in PTX, asm("name.of.it operands" : outputs : inputs), becomes name_of_it(operands), each with
the letter that says its type; shared memory whose size is the launch's, a pointer to it.
"""

import re

__all__ = ["in_cpp"]


def in_cpp(source):
    """The source with its PTX as calls, and its own shared memory as a pointer."""
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = (\1*)dynamic_shared;", source)
    while found := re.search(r"\basm(\s+volatile)?\s*\(", source):
        end = _closed(source, found.end() - 1)
        source = source[: found.start()] + _called(source[found.end() : end]) + source[end + 1 :]
    return source


def _closed(text, at):
    """Where the bracket that opens at `at` closes."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"':
            quoted = not quoted
        elif not quoted:
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                return i
    raise SyntaxError(f"a bracket is not closed: {text[at : at + 100]}")


def _called(statement):
    """What stands between the brackets of asm(...), as a call of ``_cuda.h``."""
    parts, start, i = [], 0, 0
    while i < len(statement):
        if statement[i] == '"':
            i = statement.index('"', i + 1)
        elif statement[i] == "(":
            i = _closed(statement, i)
        elif statement[i] == ":":
            parts.append(statement[start:i])
            start = i + 1
        i += 1
    parts.append(statement[start:])
    text = "".join(re.findall(r'"([^"]*)"', parts[0]))
    operands = []
    for part in parts[1:3]:  # outputs, inputs; then what it writes over
        for found in re.finditer(r'"=?([a-z])"\s*\(', part):
            operands.append(f"ptx_{found[1]}({part[found.end() : _closed(part, found.end() - 1)]})")
    name, _, given = text.strip().rstrip(";").partition(" ")
    words = [word for word in re.split(r"[\s,{}\[\]]+", given) if word]
    if sorted(words) != sorted({f"%{i}" for i in range(len(operands))} | {w for w in words if w[0] != "%"}):
        raise SyntaxError(f"{text}: expected each of its {len(operands)} operands once.")
    arguments = (operands[int(word[1:])] if word[0] == "%" else word for word in words)
    return f"{name.replace('.', '_')}({', '.join(arguments)})"
