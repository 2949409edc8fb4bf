import socket

import pytest

from deploy import checks
from onebox import sockets
from onebox.errors import SetupError
from onebox.settings import Settings, read_settings


def test_an_address_beyond_this_machine_is_refused_without_an_explicit_word() -> None:
    with pytest.raises(SetupError, match="ONEBOX_INSECURE_BIND"):
        sockets.check_bind(Settings(host="0.0.0.0"))
    sockets.check_bind(Settings(host="0.0.0.0", insecure_bind=True))
    sockets.check_bind(Settings(host="127.0.0.1"))


def test_a_taken_port_is_named_with_the_variable_that_moves_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=f"Port {port} on 127.0.0.1 is taken.*ONEBOX_API_PORT"):
            sockets.listen("127.0.0.1", port, "ONEBOX_API_PORT")


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"Too little memory .* need about .* GiB"):
        checks.check_memory(Settings(model="smollm2-135m", engine_replicas=9999))


def test_a_home_that_cannot_be_written_is_an_error_with_advice(tmp_path: object) -> None:
    with pytest.raises(SetupError, match="ONEBOX_HOME"):
        checks.check_disk(Settings(home="/proc/onebox"))  # type: ignore[arg-type]  # pydantic makes it a Path


def test_a_misspelt_variable_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBOX_API_PROT", "1")
    with pytest.raises(SetupError, match="Did you mean ONEBOX_API_PORT"):
        read_settings()


def test_a_bad_value_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBOX_API_PORT", "many")
    with pytest.raises(SetupError, match=r"ONEBOX_API_PORT.*'many'"):
        read_settings()


def test_the_installed_versions_are_at_or_above_their_floors() -> None:
    broken = [
        finding for finding in checks.doctor(Settings()) if finding.name in checks.FLOORS and finding.state != "ok"
    ]
    assert broken == []
