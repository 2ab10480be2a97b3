import pytest

from pcp_mla import cli
from pcp_mla.ops import native, registry


def test_env_prints_what_a_bug_report_needs(capsys):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for word in ("pcp-mla", "python", "torch", "triton", "transformers", "flash-attn", "nvcc", "gpu"):
        assert any(line.startswith(word) for line in text.splitlines()), word
    for name, reason in native.status.items():
        assert f"{name:12} {reason or 'loaded'}" in text
    for op in ("fused_gather", "fused_restore"):
        block = text.split(f"pcp_{op}\n")[1].split("pcp_")[0]
        for backend, reason in registry.availability(op).items():
            assert f"{backend:10} {'no: ' + reason if reason else 'yes'}" in block


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err
