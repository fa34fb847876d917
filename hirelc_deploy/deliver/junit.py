"""In: what `verify` found of a bundle. Out: a JUnit file, which CI servers show as tests."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from hirelc_deploy.deliver.verify import VerifyResult
from hirelc_deploy.errors import InputError
from hirelc_deploy.runs import write_atomic

ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold."""


def junit_xml(result: VerifyResult, bundle: Path) -> bytes:
    """Return one test suite: the bundle itself, then each comparison with the baseline."""
    suite = ElementTree.Element("testsuite", name="hirelc-deploy verify")
    case = _case(suite, "bundle", bundle)
    if result.problems:
        _add(case, "failure", "the bundle is not what it says", "\n".join(result.problems))
    if result.remarks:
        ElementTree.SubElement(case, "system-out").text = _legal("\n".join(result.remarks))
    for change in result.changes:
        case = _case(suite, change.name, bundle)
        if change.worse is None:
            _add(case, "skipped", change.text)
        elif change.worse:
            _add(case, "failure", f"{change.name} is worse than allowed", change.text)
        else:
            ElementTree.SubElement(case, "system-out").text = _legal(change.text)
    counts = {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}
    for name, path in counts.items():
        suite.set(name, str(len(suite.findall(path))))
    suite.set("errors", "0")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def write_junit(result: VerifyResult, bundle: Path, path: Path) -> None:
    """Write the JUnit file; raises InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, junit_xml(result, bundle))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --junit.") from None


def _case(suite: ElementTree.Element, name: str, bundle: Path) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_legal(str(bundle)), name=name)


def _add(case: ElementTree.Element, kind: str, message: str, text: str = "") -> None:
    ElementTree.SubElement(case, kind, message=_legal(message)).text = _legal(text)


def _legal(text: str) -> str:
    return ILLEGAL.sub("?", text)
