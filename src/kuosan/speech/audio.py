"""Sound files: any common one read as one wave and what is known of it, another sampling rate, and 16-bit WAV."""

import re
import wave as riff
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: The files that can be read, and the name that FFmpeg has for each.
FORMATS = {
    ".wav": "wav",
    ".flac": "flac",
    ".ogg": "ogg",
    ".oga": "ogg",
    ".opus": "ogg",
    ".mp3": "mp3",
    ".m4a": "mp4",
    ".g722": "g722",
}

#: A wave that never comes above this is silent: -60 dB of full scale, 33 of the 32,768 steps of 16 bits.
SILENT = 1e-3


@dataclass(frozen=True)
class Sound:
    """What is known of a sound file.

    Attributes:
        rate: samples a second.
        channels: in the file; the wave is their mean.
        format: such as "wav pcm_s16le": the kind of file, and its codec.
        bits: of a sample, or None where the codec has no such number.
        seconds: how long it is.
        peak: the largest magnitude of the wave, after mixing down.
        full_scale: the share of samples, of all channels, at the largest value that the file can hold, or beyond it.
    """

    rate: int
    channels: int
    format: str
    bits: int | None
    seconds: float
    peak: float
    full_scale: float

    @property
    def silent(self) -> bool:
        return self.peak < SILENT


def read_audio(path: str | Path) -> tuple[Tensor, Sound]:
    """A sound file as one wave, and what is known of it.

    The kind of file goes by the end of its name (`FORMATS`); its bits, rate and channels may be any. Channels are mixed
    down to their mean. Integers are divided by what full scale is, so that 16-bit PCM comes out in steps of 2^-15.
    What floating-point files and lossy codecs have beyond [-1, 1] is cut off there, and is part of
    `Sound.full_scale`. Lossy files may come out some hundredths of a second longer or shorter than they once were.

    A file cut short is found out in .wav, .flac and .m4a, and in .mp3 with a Xing header, as encoders write it. Of .ogg
    only one cut inside its first page is; raw .g722 has no header, so that any file at all sounds like something.

    Returns:
        The wave, float32 (N,) in [-1, 1], at the file's own rate.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is a folder, of an unknown kind, not what its name says, damaged, cut short or without samples;
            or its values are not numbers, or so large that they are not in units of full scale.
        ImportError: the library `av` is not installed.
    """
    av = _av()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a sound file, but there is nothing at {path}")
    if path.is_dir():
        raise ValueError(f"expected a sound file, but {path} is a folder")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is of an unknown kind: expected {', '.join(FORMATS)}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has zero bytes")
    try:
        known = _knows_its_length(path, kind)
        with av.open(f"file:{path}", format=kind) as container:  # otherwise "take:1.wav" is a protocol named "take"
            if not container.streams.audio:
                raise ValueError(f"no sound is found in {path}: it has none, or is cut short")
            stream = container.streams.audio[0]
            frames = list(container.decode(stream))
            codec = stream.codec_context.name
            stated = float(stream.duration * stream.time_base) if known and stream.duration else 0.0
    except (av.error.FFmpegError, OSError) as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}; it is no {path.suffix}, or damaged, or cut short") from None
    samples = [frame for frame in frames if frame.samples]
    if not samples:
        other = "" if kind == "wav" else ", or it is cut short, or not what its name says"
        raise ValueError(f"{path} holds no samples: its length is zero{other}")
    first = samples[0]
    if len({(frame.sample_rate, frame.layout.nb_channels) for frame in samples}) > 1:
        raise ValueError(f"{path} changes its rate or its channels on the way: convert it to one of each")
    values = np.concatenate([_channels(frame) for frame in samples], axis=1)
    rate, (channels, length) = first.sample_rate, values.shape
    if length / rate < stated - _TOLERANCE:
        has = f"its header says {stated:.2f} s, and it has {length / rate:.2f} s"
        raise ValueError(f"{path} is cut short or damaged: {has}")
    form = first.format.name.removesuffix("p")
    scaled, full = _scaled(values, form)
    if not np.isfinite(scaled).all():
        count = np.count_nonzero(~np.isfinite(scaled))
        raise ValueError(f"{path}: {count:,} of {scaled.size:,} samples are not finite numbers")
    magnitude = np.abs(scaled)
    if magnitude.max() > _LOUDEST:
        raise ValueError(f"{path}: its values reach {magnitude.max():,.6g}, where full scale is 1: divide them first")
    mixed = np.clip(scaled, -1, 1).mean(axis=0, dtype=np.float32)
    sound = Sound(
        rate=rate,
        channels=channels,
        format=f"{kind} {codec}",
        bits=_bits(codec, form),
        seconds=length / rate,
        peak=float(np.abs(mixed).max()),
        full_scale=float((magnitude >= full).mean()),
    )
    return torch.from_numpy(mixed), sound


def resampled(wave: Tensor, rate: int, to: int) -> Tensor:
    """A wave (N,) at another sampling rate, ceil(N to / rate) long, and in time with what it was.

    By soxr at its high quality, to the sample what `librosa.resample` gives, without the seconds that librosa takes to
    get ready. From 48 to 16 kHz a tone of 7.4 kHz keeps its level to 0.02 dB, and of one of 8.2 kHz there is left -130
    dB; of FFmpeg's resampler that is -2 dB and -15 dB. Next to full scale the result may pass 1 by a little.

    Raises:
        ValueError: a rate is not positive.
        ImportError: the library `soxr`, which comes with librosa, is not installed.
    """
    if rate < 1 or to < 1:
        raise ValueError(f"sampling rates are at least 1 Hz, got {rate} and {to}")
    if rate == to:
        return wave
    try:
        import soxr
    except ImportError:
        raise ImportError("resampling needs soxr: pip install 'kuosan[speech]'") from None
    length = -(-len(wave) * to // rate)
    result = soxr.resample(wave.numpy().astype(np.float32, copy=False), rate, to, quality="HQ")
    return torch.from_numpy(np.pad(result, (0, max(0, length - len(result))))[:length])


def write_wav(path: str | Path, wave: Tensor, rate: int) -> int:
    """Write a wave (N,) as a 16-bit WAV file, and say how many samples lay outside [-1, 1] and were cut off there.

    What :func:`read_audio` makes of 16-bit files comes back to the bit. 1 itself, which 16 bits do not have, becomes
    the next lower step, and is not counted.

    Raises:
        ValueError: the wave is not one-dimensional, is empty, or has values that are not finite numbers.
    """
    values = wave.detach().cpu().double().numpy()
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{path}: expected a wave of shape (N,), N at least 1, got {tuple(wave.shape)}")
    if not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise ValueError(f"{path}: {count:,} of {values.size:,} samples are not finite numbers")
    steps = np.rint(values * 32768).clip(-32768, 32767).astype("<i2")
    with riff.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(steps.tobytes())
    return int((np.abs(values) > 1).sum())


_TOLERANCE = 0.05  # seconds that may be missing at the end, of codecs that work in frames
_LOUDEST = 10.0  # +20 dB: what is louder is not in units of full scale
_UNKNOWN = 0x7FFF0000  # of RIFF: where the length was not known when the header was written, it says as much or more


def _av():
    try:
        import av
        import av.error
    except ImportError:
        raise ImportError("reading sound files needs PyAV: pip install 'kuosan[speech]'") from None
    return av


def _knows_its_length(path: Path, kind: str) -> bool:
    """Whether FFmpeg has the length of such a file from its header, instead of guessing it from the bytes there are.

    It does not for .wav, which is looked at here, and for .mp3 only where the first frame is a Xing header.

    Raises:
        ValueError: a .wav has less in it than its header says.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            stated, there = int.from_bytes(head[4:8], "little") + 8, path.stat().st_size
            if 8 < stated < _UNKNOWN and there < stated - 1:  # 1: a byte of padding that some leave out
                raise ValueError(f"{path} is cut short: its header says {stated:,} bytes, and it has {there:,}")
        if kind == "mp3":
            tag = 0
            if head[:3] == b"ID3":  # whose size is in four times seven bits
                tag = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            file.seek(tag)
            first = file.read(256)
            return b"Xing" in first or b"Info" in first
    return kind in ("flac", "mp4")


def _channels(frame) -> np.ndarray:
    """A frame's values as (channels, N)."""
    values = frame.to_ndarray()
    return values if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels).T


def _scaled(values: np.ndarray, form: str) -> tuple[np.ndarray, float]:
    """Values in units of full scale, and the magnitude from which on they are at it."""
    if form == "u8":
        return (values.astype(np.float32) - 128) / 128, 127 / 128
    if form == "s16":
        return values.astype(np.float32) / 2**15, 1 - 2**-15
    if form == "s32":  # which 24 bits come as, too
        return values.astype(np.float32) / 2**31, 1 - 2**-23
    return values.astype(np.float32), 1.0


def _bits(codec: str, form: str) -> int | None:
    if pcm := re.fullmatch(r"pcm_[suf](\d+)(?:le|be)?", codec):
        return int(pcm[1])
    return {"s16": 16, "s32": 24}.get(form) if codec == "flac" else None
