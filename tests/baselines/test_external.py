"""The programs are shell scripts that copy files: what is tested is how they are found, called, read and reported."""

import os
import sys
import time

import numpy as np
import pytest
from PIL import Image

from oscar.baselines import BaselineUnavailable, CodecError, make_baseline
from oscar.metrics.image import psnr

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are shell scripts")

COPY = """
output= input=
while [ $# -gt 0 ]; do
  case "$1" in
    -o) if [ "$2" != /dev/null ]; then output="$2"; fi; shift ;;
    -b) case "$2" in in.*) input="$2" ;; out.*) output="$2" ;; esac; shift ;;
    in.*) input="$1" ;;
  esac
  shift
done
cp "$input" "$output"
"""
PROGRAMS = {
    "bpg": ("bpgenc", "bpgdec"),
    "vtm": ("EncoderAppStatic", "DecoderAppStatic"),
    "vvenc": ("vvencapp", "vvdecapp"),
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a program into a folder of the PATH."""
    folder = tmp_path / "vtm" / "bin"
    folder.mkdir(parents=True)
    (tmp_path / "vtm" / "cfg").mkdir()
    (tmp_path / "vtm" / "cfg" / "encoder_intra_vtm.cfg").write_text("QP : 32\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(name, body=COPY):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$0 $@" >> {tmp_path}/calls\n{body}\n')
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def photo():
    y, x = np.mgrid[0:21, 0:30]
    return Image.fromarray(np.stack([x * 8, y * 12, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", PROGRAMS)
def test_round_trip(install, photo, name, tmp_path):
    for program in PROGRAMS[name]:
        install(program)
    codec = make_baseline(name)
    result = codec.round_trip(photo, codec.points[1])
    assert result.decoded.size == photo.size
    # The copies lose nothing but, in VVenC's 4:2:0, colour detail.
    assert psnr(result.decoded, photo) > (32 if name == "vvenc" else 55)
    assert sum(result.encoded.parts.values()) == len(result.encoded.data)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and f" -q {codec.points[1]} " in calls[0]
    if name != "bpg":
        assert len(result.encoded.data) == 4 + 2 * 32 * 24 * (3 if name == "vtm" else 1.5)  # padded to multiples of 8


def test_vtm_is_told_its_settings(install, photo, tmp_path):
    for program in PROGRAMS["vtm"]:
        install(program)
    make_baseline("vtm").encode(photo, 32)
    call = (tmp_path / "calls").read_text()
    for words in ("-wdt 32 -hgt 24", "--InputChromaFormat=444", "--InputBitDepth=10", "cfg/encoder_intra_vtm.cfg"):
        assert words in call


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_program_is_named_with_its_source(install, monkeypatch, tmp_path, name, missing):
    monkeypatch.setenv("PATH", str(tmp_path / "vtm" / "bin"))
    install(PROGRAMS[name][1 - missing])
    with pytest.raises(BaselineUnavailable) as caught:
        make_baseline(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and PROGRAMS[name][missing] in message and "https://" in message
    assert "\n" not in message


def test_a_missing_vtm_config_is_named(install, tmp_path):
    for program in PROGRAMS["vtm"]:
        install(program)
    with pytest.raises(BaselineUnavailable, match="^vtm: no file .*absent.cfg; give VTM's encoder_intra_vtm.cfg"):
        make_baseline("vtm", config=tmp_path / "absent.cfg")


def test_failure_names_program_code_and_last_words(install, photo):
    install("bpgenc", "echo starting; echo 'out of memory' >&2; exit 3")
    install("bpgdec")
    with pytest.raises(CodecError, match="^bpg: bpgenc ended with exit code 3: out of memory$"):
        make_baseline("bpg").encode(photo, 30)


def test_failure_of_the_decoder(install, photo):
    install("bpgenc")
    install("bpgdec", "exit 1")
    codec = make_baseline("bpg")
    with pytest.raises(CodecError, match="^bpg: bpgdec ended with exit code 1: it printed nothing$"):
        codec.decode(codec.encode(photo, 30).data)


def test_success_without_a_file_is_a_failure(install, photo):
    install("bpgenc", "echo nothing to do")
    install("bpgdec")
    with pytest.raises(CodecError, match="^bpg: bpgenc wrote no file: nothing to do$"):
        make_baseline("bpg").encode(photo, 30)


def test_a_program_that_hangs_is_ended(install, photo):
    install("vvencapp", "sleep 30")
    install("vvdecapp")
    start = time.monotonic()
    with pytest.raises(CodecError, match="^vvenc: vvencapp took longer than 0.2 seconds$"):
        make_baseline("vvenc", timeout=0.2).encode(photo, 32)
    assert time.monotonic() - start < 10


def test_samples_of_another_size_are_refused(install, photo):
    install("vvencapp")
    install("vvdecapp", "echo short > out.yuv")
    codec = make_baseline("vvenc")
    with pytest.raises(CodecError, match="^vvenc: vvdecapp wrote 6 bytes of decoded samples; 32x24 in 4:2:0 has 2304$"):
        codec.decode(codec.encode(photo, 32).data)


def test_the_version_is_what_the_program_says(install):
    install("bpgenc", "echo 'BPG Image Encoder version 0.9.8'; exit 1")
    install("bpgdec")
    described = make_baseline("bpg").describe()
    assert described["version"] == "BPG Image Encoder version 0.9.8" and described["settings"]["level"] == 9


def test_points_out_of_range_and_wrong_options(install, photo):
    for program in PROGRAMS["bpg"]:
        install(program)
    with pytest.raises(ValueError, match="^bpg: QP 52 is not allowed; allowed: whole numbers from 0 to 51$"):
        make_baseline("bpg").encode(photo, 52)
    with pytest.raises(ValueError, match="^bpg: timeout 0 is not allowed"):
        make_baseline("bpg", timeout=0)
    assert make_baseline("bpg", points=[30, 40]).points == (40, 30)  # smallest file first
