"""What is known of a video and of when its frames are shown."""

from transformers.video_utils import VideoMetadata

from .video_index import FrameIndex


class TimedVideoMetadata(VideoMetadata):
    """`VideoMetadata` with the [`FrameIndex`] of the video as `index`: frames need not have equal distances."""

    index: FrameIndex

    @classmethod
    def of(cls, index: FrameIndex, video_backend: str) -> "TimedVideoMetadata":
        metadata = cls(index.num_frames, index.fps, duration=index.duration, video_backend=video_backend)
        metadata.index = index
        return metadata

    @property
    def timestamps(self) -> list[float]:
        """Seconds from the first frame of the video to each of the sampled ones."""
        if self.frames_indices is None:
            raise ValueError("`timestamps` are known after frames have been sampled: `frames_indices` is None.")
        return self.index.times[self.frames_indices].tolist()
