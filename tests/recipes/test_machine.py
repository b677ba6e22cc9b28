import json
import platform
import subprocess
import sys
from pathlib import Path

from tinyr2.recipes import machine
from tinyr2.recipes.machine import describe_machine

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8
processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8
"""
MEMINFO = "MemTotal:       24684092 kB\nMemFree:        22946928 kB\nMemAvailable:   23508080 kB\n"


def test_the_description_is_json_and_names_this_python_and_its_packages():
    found = json.loads(json.dumps(describe_machine()))
    assert found["python"] == platform.python_version()
    assert found["versions"]["numpy"] == __import__("numpy").__version__
    assert set(found["versions"]) >= {"torch", "transformers", "tokenizers", "datasets", "peft"}
    assert found["cpu"]["cores"] >= found["cpu"]["cores_usable"] >= 1
    assert found["disk_free_mib"] > 0


def test_a_missing_package_has_no_version():
    assert machine._version("no-such-package-here") is None


def test_processor_and_instruction_sets_are_read_from_cpuinfo():
    assert machine._parse_cpuinfo(CPUINFO) == (
        "Intel(R) Xeon(R) Platinum 8480+", ["avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"])
    assert machine._parse_cpuinfo("Features\t: fp asimd sve i8mm bf16\n") == (None, ["asimd", "i8mm", "bf16", "sve"])
    assert machine._parse_cpuinfo("") == (None, None)


def test_memory_is_mebibytes_and_unknown_where_the_system_is_silent():
    assert machine._parse_meminfo(MEMINFO) == (24105, 22957)
    assert machine._parse_meminfo("") == (None, None)


def test_a_container_quota_is_cores_and_max_is_no_quota():
    assert machine._parse_cpu_quota("150000 100000\n") == 1.5
    assert machine._parse_cpu_quota("max 100000\n") is None
    assert machine._parse_cpu_quota(None) is None


def test_settings_are_shown_and_secrets_only_said_to_be_set(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TOKEN"):
        monkeypatch.setenv(name, "planted-secret")
    found = describe_machine()
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["environment"]["OMP_NUM_THREADS"] == "2"
    assert found["environment"]["HF_TOKEN"] == "set (not shown)"
    assert "MY_TOKEN" not in found["environment"]
    assert "planted-secret" not in json.dumps(found)


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path):
    here, later = (describe_machine(folder)["disk_free_mib"] for folder in (tmp_path, tmp_path / "a" / "b"))
    assert abs(here - later) < 1024


def test_the_commit_is_the_working_directorys_and_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_machine()["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "-q"], check=True)
    assert describe_machine()["git_commit"] is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-verify", "-m", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert describe_machine()["git_commit"] == head


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_machine()["git_commit"] is None


def test_a_command_that_fails_or_says_nothing_gives_none():
    assert machine._output(sys.executable, "-c", "raise SystemExit(3)") is None
    assert machine._output(sys.executable, "-c", "") is None
    assert machine._output(sys.executable, "-c", "print(5)") == "5"


def test_accelerators_are_unknown_without_torch_and_listed_with_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", _FakeTorch)
    assert machine._accelerators() == {
        "cuda": [{"name": "H200", "memory_mib": 143_360, "capability": "9.0"}], "mps": False}
    monkeypatch.delitem(sys.modules, "torch")
    assert machine._accelerators() == {"cuda": None, "mps": None}


def test_describing_imports_nothing_heavy_and_is_quick():
    code = ("import sys, time\nfrom tinyr2.recipes.machine import describe_machine\n"
            "start = time.perf_counter()\ndescribe_machine()\n"
            "print(time.perf_counter() - start, 'torch' in sys.modules, 'numpy' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(machine.__file__).parents[2])
    seconds, torch, numpy = done.stdout.split()
    assert (torch, numpy) == ("False", "False")
    assert float(seconds) < 0.5  # ten times what it takes, for a busy machine


class _FakeTorch:
    class cuda:
        @staticmethod
        def device_count():
            return 1

        @staticmethod
        def get_device_properties(index):
            return type("Device", (), {"name": "H200", "total_memory": 143_360 * 2**20, "major": 9, "minor": 0})

    class backends:
        class mps:
            @staticmethod
            def is_available():
                return False
