"""Sound files of any kind become one wave in units of full scale, and what is wrong with one is said."""

import shutil
import struct
import sys
import wave

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from kuosan.speech.audio import read_audio, resampled, write_wav  # noqa: E402


def sine(hz, seconds=1.0, rate=16000, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def write_pcm(file, steps, bytes_each, rate=16000, channels=1):
    """Integers as a WAV file, by the standard library; 8 bits are unsigned there."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(bytes_each)
        out.setframerate(rate)
        offset = 128 if bytes_each == 1 else 0
        out.writeframes(b"".join((int(v) + offset).to_bytes(bytes_each, "little", signed=not offset) for v in steps))
    return file


def encode(file, values, codec, kind, rate=16000):
    """By FFmpeg's encoders, from 16-bit integers."""
    with av.open(str(file), "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((values * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.rate = rate
        size = stream.codec_context.frame_size or 1024
        cut = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate, frame_size=size)
        for piece in [*cut.resample(frame), *cut.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return file


def loudest_hz(values, rate):
    """By the largest of the Fourier coefficients under a window, between bins by a parabola through logarithms."""
    power = np.log(np.abs(np.fft.rfft(values * np.hanning(len(values)))) + 1e-12)
    at = int(power.argmax())
    left, middle, right = power[at - 1 : at + 2]
    return (at + (left - right) / (2 * (left - 2 * middle + right))) * rate / len(values)


STEPS = [0, 1, -1, 17, -100, 127, -128]


@pytest.mark.parametrize("bytes_each", [1, 2, 3, 4])
def test_integers_of_any_size_are_in_units_of_full_scale(tmp_path, bytes_each):
    """By hand: the same seven steps at the top bits of each size, the last of them -1 itself."""
    shift = 8 * (bytes_each - 1)
    came, sound = read_audio(write_pcm(tmp_path / "a.wav", [v << shift for v in STEPS], bytes_each))
    assert came.dtype == torch.float32
    assert came.tolist() == [v / 128 for v in STEPS]
    assert (sound.rate, sound.channels, sound.bits) == (16000, 1, 8 * bytes_each)
    assert sound.peak == 1
    assert not sound.silent


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floating_point_is_taken_as_it_is_and_cut_off_at_full_scale(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", np.array([0.25, -0.5, 1.5, 1.0, -2.0, 0.125]), 22050, subtype=subtype)
    came, sound = read_audio(tmp_path / "a.wav")
    assert came.tolist() == [0.25, -0.5, 1.0, 1.0, -1.0, 0.125]
    assert sound.full_scale == 0.5
    assert (sound.rate, sound.bits, sound.peak) == (22050, {"FLOAT": 32, "DOUBLE": 64}[subtype], 1)


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_16", 16), ("PCM_24", 24)])
def test_flac_gives_back_what_was_written(tmp_path, subtype, bits):
    steps = np.random.default_rng(3).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 9000)
    soundfile.write(tmp_path / "a.flac", (steps << (32 - bits)).astype(np.int32), 48000, subtype=subtype)
    came, sound = read_audio(tmp_path / "a.flac")
    assert np.array_equal(came.numpy(), (steps / 2 ** (bits - 1)).astype(np.float32))
    assert (sound.format, sound.rate, sound.bits, sound.seconds) == ("flac flac", 48000, bits, 9000 / 48000)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_channels_are_mixed_down_to_their_mean(tmp_path, name):
    """Three different channels, interleaved by numpy, at 96 kHz."""
    channels = np.stack([sine(300, 0.1, 96000), sine(700, 0.1, 96000, 0.2), np.linspace(-0.3, 0.6, 9600)], axis=1)
    steps = np.rint(channels * 32768).astype(np.int16)
    soundfile.write(tmp_path / name, steps, 96000)
    came, sound = read_audio(tmp_path / name)
    assert np.allclose(came.numpy(), steps.astype(float).mean(axis=1) / 32768, atol=1e-6)
    assert (sound.rate, sound.channels, sound.seconds) == (96000, 3, 0.1)


LOSSY = {
    "a.ogg": (None, None),
    "a.opus": (None, None),
    "a.mp3": ("libmp3lame", "mp3"),
    "a.m4a": ("aac", "ipod"),
    "a.g722": ("g722", "g722"),
}


@pytest.mark.parametrize(("name", "codec", "kind"), [(n, *how) for n, how in LOSSY.items()], ids=LOSSY)
def test_lossy_files_sound_like_what_was_written(tmp_path, name, codec, kind):
    """Two tones; each comes back with its frequency, and nearly its level. Opus is always of 48 kHz."""
    written = sine(440, 2) + sine(3000, 2, amplitude=0.05)
    if codec is None:
        subtype = "OPUS" if name == "a.opus" else "VORBIS"
        soundfile.write(tmp_path / name, written, 16000, format="OGG", subtype=subtype)
    elif codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    else:
        encode(tmp_path / name, written, codec, kind)
    came, sound = read_audio(tmp_path / name)
    assert (sound.rate, sound.channels, sound.bits) == (48000 if name == "a.opus" else 16000, 1, None)
    assert 1.97 <= sound.seconds <= 2.13
    middle = came.numpy()[sound.rate // 2 : 3 * sound.rate // 2]
    assert loudest_hz(middle, sound.rate) == pytest.approx(440, abs=0.2)
    assert middle.std() * 2**0.5 == pytest.approx(0.5, rel=0.05)
    spectrum = np.abs(np.fft.rfft(middle)) / len(middle) * 2  # one bin a hertz
    assert spectrum[3000] == pytest.approx(0.05, rel=0.4)


def test_silence_and_full_scale_are_facts(tmp_path):
    """16 bits: 32 steps are -60.2 dB, and silent; 33 are not. Of 1,000 samples 30 + 20 are at either end."""
    assert read_audio(write_pcm(tmp_path / "a.wav", [32, -32] * 50, 2))[1].silent
    assert not read_audio(write_pcm(tmp_path / "b.wav", [33, -33] * 50, 2))[1].silent
    steps = [32767] * 30 + [-32768] * 20 + [32766, -32766] * 475
    wave_, sound = read_audio(write_pcm(tmp_path / "c.wav", steps, 2))
    assert sound.full_scale == 0.05
    assert wave_.max() == 32767 / 32768
    assert read_audio(write_pcm(tmp_path / "d.wav", [127, 126, -128, -126], 1))[1].full_scale == 0.5
    assert read_audio(write_pcm(tmp_path / "e.wav", [2**23 - 1, 2**23 - 3, -(2**23), 0], 3))[1].full_scale == 0.5


def test_one_clipped_channel_of_two_is_seen(tmp_path):
    assert read_audio(write_pcm(tmp_path / "a.wav", [32767, 0] * 100, 2, channels=2))[1].full_scale == 0.5


@pytest.mark.parametrize("name", ["take:1.wav", "a b%20c.wav", "声音.WAV", "-a.wav"])
def test_a_name_is_nothing_but_a_name(tmp_path, monkeypatch, name):
    """Relative, where what stands before a colon would be a protocol."""
    monkeypatch.chdir(tmp_path)
    write_pcm(tmp_path / name, STEPS, 2)
    assert len(read_audio(name)[0]) == 7


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_a_wav_that_was_written_before_its_length_was_known_is_whole(tmp_path, size):
    content = bytearray(write_pcm(tmp_path / "a.wav", [5] * 3000, 2).read_bytes())
    content[4:8] = content[40:44] = size
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav")[0]) == 3000


# -- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "m4a"])
def test_text_is_no_sound_whatever_its_name(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    file.write_text("this is text\n" * 1000)
    with pytest.raises(ValueError, match=rf"a\.{ending} (cannot be read: .*; it is no \.{ending}|.*not what its name)"):
        read_audio(file)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "m4a", "g722"])
def test_zero_bytes_are_said(tmp_path, ending):
    (tmp_path / f"a.{ending}").touch()
    with pytest.raises(ValueError, match=rf"a\.{ending} is empty: it has zero bytes"):
        read_audio(tmp_path / f"a.{ending}")


def test_a_header_without_samples_is_of_zero_length(tmp_path):
    with pytest.raises(ValueError, match=r"a\.wav holds no samples: its length is zero$"):
        read_audio(write_pcm(tmp_path / "a.wav", [], 2))


def test_what_is_no_sound_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a\.txt is of an unknown kind: expected \.wav, \.flac, .*\.g722"):
        read_audio(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"nothing at .*b\.wav"):
        read_audio(tmp_path / "b.wav")
    (tmp_path / "c.wav").mkdir()
    with pytest.raises(ValueError, match=r"c\.wav is a folder"):
        read_audio(tmp_path / "c.wav")


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Ten seconds of noise and a tone in each kind of file whose length is known."""
    folder = tmp_path_factory.mktemp("contents")
    values = np.clip(sine(500, 10) + 0.1 * np.random.default_rng(0).standard_normal(160_000), -1, 1)
    for name, subtype in (("a.wav", "PCM_16"), ("b.wav", "FLOAT"), ("a.flac", "PCM_16"), ("a.mp3", None)):
        soundfile.write(folder / name, values, 16000, subtype=subtype)
    encode(folder / "a.m4a", values, "aac", "ipod")
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    tag = b"ID3\x04\0\0" + bytes([0, 0, 4, 8]) + bytes(4 * 128 + 8)  # as titles and pictures make it
    return found | {"b.mp3": tag + found["a.mp3"]}


@pytest.mark.parametrize("name", ["a.wav", "b.wav", "a.flac", "a.mp3", "b.mp3", "a.m4a"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_file_cut_short_is_refused(contents, tmp_path, name, share):
    file, content = tmp_path / name, contents[name]
    file.write_bytes(content)
    assert read_audio(file)[1].seconds == pytest.approx(10, abs=0.15)
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"{name}.* cut short"):
        read_audio(file)


def test_a_flac_cut_between_two_frames_is_refused(contents, tmp_path):
    """There the decoder has nothing to object to; frames begin with the bits of 0xFFF8."""
    content = contents["a.flac"]
    at = content.index(b"\xff\xf8", content.index(b"\xff\xf8") + 2000)
    (tmp_path / "a.flac").write_bytes(content[:at])
    with pytest.raises(ValueError, match=r"a\.flac is cut short .*: its header says 10\.00 s, and it has 0\.\d\d s"):
        read_audio(tmp_path / "a.flac")


@pytest.mark.parametrize("name", ["a.flac", "a.mp3"])
def test_a_damaged_file_is_refused(contents, tmp_path, name):
    """Three hundred bytes in the middle are zero."""
    content, at = contents[name], len(contents[name]) // 2
    (tmp_path / name).write_bytes(content[:at] + bytes(300) + content[at + 300 :])
    with pytest.raises(ValueError, match=f"{name} .* damaged"):
        read_audio(tmp_path / name)


def test_values_that_are_no_numbers_or_not_in_units_of_full_scale_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0, np.nan, np.inf, 0.5]), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav: 2 of 4 samples are not finite"):
        read_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.array([0, 12000.0, -3]), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"b\.wav: its values reach 12,000, where full scale is 1: divide"):
        read_audio(tmp_path / "b.wav")


def test_a_file_that_changes_its_rate_is_refused(tmp_path):
    """Two MP3 files, one after the other."""
    soundfile.write(tmp_path / "a.mp3", sine(500), 16000)
    soundfile.write(tmp_path / "b.mp3", sine(500, rate=32000), 32000)
    (tmp_path / "c.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    with pytest.raises(ValueError, match=r"c\.mp3 changes its rate"):
        read_audio(tmp_path / "c.mp3")


def test_a_film_without_sound_has_none(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"no sound is found in .*a\.m4a"):
        read_audio(tmp_path / "a.m4a")


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    file = write_pcm(tmp_path / "a.wav", STEPS, 2)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[speech\]'"):
        read_audio(file)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[speech\]'"):
        resampled(torch.zeros(10), 16000, 8000)


# -- another rate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "to"), [(44100, 16000), (96000, 16000), (8000, 16000), (16000, 22050), (16000, 8000)])
def test_a_tone_keeps_its_frequency_level_and_time(rate, to):
    """The same tone computed at the new rate; at the ends the filter sees what lies beyond."""
    came = resampled(torch.from_numpy(sine(1234.5, 1, rate)).float(), rate, to)
    assert came.dtype == torch.float32
    assert len(came) == to
    inside = slice(to // 10, -to // 10)
    assert np.allclose(came.numpy()[inside], sine(1234.5, 1, to)[inside], atol=1e-4)
    assert loudest_hz(came.numpy(), to) == pytest.approx(1234.5, abs=0.05)


def test_a_tone_above_the_new_band_is_gone_and_one_under_it_stays():
    assert resampled(torch.from_numpy(sine(8200, 1, 48000)).float(), 48000, 16000)[1600:-1600].abs().max() < 1e-5
    kept = resampled(torch.from_numpy(sine(7400, 1, 48000)).float(), 48000, 16000)[1600:-1600]
    assert kept.std() * 2**0.5 == pytest.approx(0.5, rel=0.005)


@pytest.mark.parametrize(("count", "rate", "to", "length"), [(7, 96000, 16000, 2), (1, 16000, 8000, 1), (3, 1, 7, 21)])
def test_the_length_is_rounded_up(count, rate, to, length):
    assert len(resampled(torch.ones(count), rate, to)) == length


def test_the_same_rate_changes_nothing_and_no_rate_is_refused():
    values = torch.randn(100)
    assert resampled(values, 16000, 16000) is values
    with pytest.raises(ValueError, match="at least 1 Hz, got 0 and 16000"):
        resampled(values, 0, 16000)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_cut_off_and_counted_and_never_wrapped(tmp_path):
    """Read by the standard library; by hand."""
    values = torch.tensor([0, 0.5, -0.5, 1, -1, 1.0001, -3, 7, 2**-15, 2**-17], dtype=torch.float64)
    assert write_wav(tmp_path / "a.wav", values, 8000) == 3
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (8000, 2, 1)
        steps = struct.unpack("<10h", file.readframes(10))
    assert steps == (0, 16384, -16384, 32767, -32768, 32767, -32768, 32767, 1, 0)


def test_16_bits_come_back_as_they_were(tmp_path):
    write_pcm(tmp_path / "a.wav", np.random.default_rng(1).integers(-32768, 32768, 5000), 2, rate=11025)
    came, sound = read_audio(tmp_path / "a.wav")
    assert write_wav(tmp_path / "b.wav", came, sound.rate) == 0
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()


def test_what_cannot_be_written_is_refused(tmp_path):
    for values, words in (
        (torch.zeros(2, 5), r"shape \(N,\), N at least 1, got \(2, 5\)"),
        (torch.zeros(0), r"got \(0,\)"),
        (torch.tensor([0, torch.nan]), "1 of 2 samples are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            write_wav(tmp_path / "a.wav", values, 16000)
    assert not (tmp_path / "a.wav").exists()


def test_a_wave_that_needs_a_gradient_can_be_written(tmp_path):
    assert write_wav(tmp_path / "a.wav", torch.zeros(5, requires_grad=True), 16000) == 0
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.wav")
    assert read_audio(tmp_path / "b.wav")[1].silent
