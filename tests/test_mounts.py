"""Where a stamp proves anything: real images of file systems, exchanged under one mount point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from persist_cache.fingerprint.identifier import identify_or_reason
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.system.mounts import Mount, Mounts, parse_mount_command, parse_mountinfo

DATE = 1_700_000_000


def write_model(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    values = np.random.default_rng(seed).standard_normal((8, 64), dtype=np.float32)
    save_file({"model.embed_tokens.weight": values}, folder / "model.safetensors")
    for path in (*folder.iterdir(), folder):
        os.utime(path, (DATE, DATE))
    return folder


def squashfs(source: Path, image: Path) -> list[str]:
    fixed = ["-mkfs-time", str(DATE), "-all-time", str(DATE), "-all-root"]
    return ["mksquashfs", str(source), str(image), "-noappend", "-quiet", "-no-progress", *fixed]


def erofs(source: Path, image: Path) -> list[str]:
    fixed = ["-T", str(DATE), "-U", "0" * 8 + "-0000-0000-0000-" + "0" * 12, "--all-root"]
    return ["mkfs.erofs", *fixed, str(image), str(source)]


class Images:
    """Mounts images at one place, one after the other; skips by name what cannot be mounted."""

    def __init__(self, folder: Path) -> None:
        self.point = folder / "mounted"
        self.point.mkdir()
        self._is_mounted = False

    def mount(self, image: Path, *options: str) -> None:
        self.unmount()
        command = ["mount", "-o", ",".join(("loop", *options)), str(image), str(self.point)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"an image cannot be mounted here: {done.stderr.strip()}")
        self._is_mounted = True

    def unmount(self) -> None:
        if self._is_mounted:
            subprocess.run(["umount", str(self.point)], check=True)
            self._is_mounted = False


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    if os.geteuid():
        pytest.skip("only root can mount images")
    made = Images(tmp_path)
    yield made
    made.unmount()


def make(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run(command, check=True, capture_output=True)


def weights(model: Path) -> str:
    found = identify_or_reason(str(model))
    assert isinstance(found, Fingerprint), found
    return found.fields["weights"]


def stamp(model: Path) -> tuple[int, ...]:
    status = (model / "model.safetensors").stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@pytest.mark.parametrize("build", [squashfs, erofs])
def test_two_images_with_fixed_dates_have_two_identities(
    tmp_path: Path, images: Images, build: Callable[[Path, Path], list[str]]
) -> None:
    for seed in (1, 2):
        make(build(write_model(tmp_path / str(seed), seed), tmp_path / f"{seed}.img"))

    images.mount(tmp_path / "1.img")
    first, first_stamp = weights(images.point), stamp(images.point)
    images.mount(tmp_path / "2.img")
    second, second_stamp = weights(images.point), stamp(images.point)

    assert first_stamp == second_stamp, "else this test shows nothing"
    assert first != second
    assert weights(tmp_path / "2") == second


@pytest.mark.parametrize("build", [squashfs, erofs])
def test_name_of_a_hub_blob_in_an_image_is_not_believed(
    tmp_path: Path, images: Images, build: Callable[[Path, Path], list[str]]
) -> None:
    for seed in (1, 2):
        snapshot = write_model(tmp_path / str(seed) / "models--o--n/snapshots" / ("c" * 40), seed)
        blob = tmp_path / str(seed) / "models--o--n/blobs" / ("ab" * 32)
        blob.parent.mkdir()
        (snapshot / "model.safetensors").rename(blob)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
        make(build(tmp_path / str(seed), tmp_path / f"{seed}.img"))
    found = []

    for seed in (1, 2):
        images.mount(tmp_path / f"{seed}.img")
        found.append(weights(images.point / "models--o--n/snapshots" / ("c" * 40)))

    assert len(set(found)) == 2
    assert f"sha256:{'ab' * 32}" not in found


def test_file_rewritten_on_fat_with_its_dates_put_back_has_another_identity(
    tmp_path: Path, images: Images
) -> None:
    image = tmp_path / "fat.img"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    make(["mkfs.vfat", str(image)])
    images.mount(image)
    model = write_model(images.point / "model", 1)
    first, first_stamp = weights(model), stamp(model)

    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, (DATE, DATE))
    images.mount(image)

    if stamp(model) != first_stamp:
        pytest.skip("this kernel's FAT gives the file another stamp")
    assert weights(model) != first


@pytest.mark.parametrize("options", [[], ["ro"]])
def test_image_of_a_file_system_with_ctime_is_remembered_only_when_it_can_be_written(
    tmp_path: Path, images: Images, options: list[str]
) -> None:
    image = tmp_path / "ext4.img"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    make(["mkfs.ext4", "-q", "-I", "256", str(image)])
    images.mount(image)
    model = write_model(images.point / "model", 1)
    images.mount(image, *options)
    path = model / "model.safetensors"

    assert Mounts().ctime_proves(path, path.stat()) is (not options)


def test_overlay_of_an_image_is_read(tmp_path: Path, images: Images) -> None:
    make(erofs(write_model(tmp_path / "source", 1), tmp_path / "lower.img"))
    images.mount(tmp_path / "lower.img")
    status = os.stat_result((0o100644, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0.5, 0.5, 0.5, 0, 7, 7))
    mounts = Mounts(
        [
            *parse_mountinfo(Path("/proc/self/mountinfo").read_text()),
            Mount("/merged", "overlay", lower=(str(images.point),)),
            Mount("/plain", "overlay", lower=("/only/seen/from/the/host",)),
        ]
    )

    assert not mounts.ctime_proves(Path("/merged/model"), status)
    assert mounts.ctime_proves(Path("/plain/model"), status)


def test_mountinfo_is_read_with_its_escapes() -> None:
    text = (
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
        "30 27 7:0 / /mnt/my\\040models ro,relatime shared:1 - squashfs /dev/loop0 ro\n"
        "31 27 0:9 / /bind ro - ext4 /dev/vdb rw\n"
        "32 27 0:8 / /o rw - overlay overlay rw,lowerdir=/a\\:b:/c,upperdir=/u\n"
        "nonsense\n"
    )

    assert parse_mountinfo(text) == [
        Mount("/", "ext4"),
        Mount("/mnt/my models", "squashfs", read_only=True),
        Mount("/bind", "ext4"),
        Mount("/o", "overlay", lower=("/a:b", "/c")),
    ]


def test_mount_command_of_macos_is_read() -> None:
    text = (
        "/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)\n"
        "/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse)\n"
        "/dev/disk5s1 on /Volumes/My (old) stick (msdos, local, nodev)\n"
    )

    assert parse_mount_command(text) == [
        Mount("/", "apfs", read_only=True),
        Mount("/System/Volumes/Data", "apfs"),
        Mount("/Volumes/My (old) stick", "msdos"),
    ]


@pytest.mark.parametrize(
    ("kind", "ctime_ns", "believed"),
    [
        *((kind, 5, True) for kind in ("ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs")),
        *((kind, 5, False) for kind in ("vfat", "exfat", "squashfs", "erofs", "iso9660", "msdos")),
        *((kind, 5, False) for kind in ("nfs4", "cifs", "9p", "fuse.sshfs", "virtiofs", "new")),
        ("ext4", 0, False),
        ("ext4", 3_000_000_000, False),
    ],
)
def test_stamp_is_believed_only_where_ctime_moves(
    tmp_path: Path, kind: str, ctime_ns: int, believed: bool
) -> None:
    class Status:
        st_ctime_ns = ctime_ns

    path = tmp_path / "file"
    path.touch()

    found = Mounts([Mount("/", kind)]).ctime_proves(path, Status())  # type: ignore[arg-type]

    assert found is believed


def test_nothing_is_believed_where_the_mounts_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert not Mounts([]).ctime_proves(tmp_path / "file", (tmp_path / "file").stat())


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:26 / /home/a\\040b rw - nfs4 server:/export rw
31 22 0:27 / /home rw - xfs /dev/vdb rw
"""

MOUNT = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse)
//ann@server/share on /Volumes/My share (smbfs, nodev, nosuid, mounted by ann)
"""


@pytest.mark.parametrize(
    ("place", "expected"),
    [("/home/a b/store", "nfs4"), ("/home/ab", "xfs"), ("/homes", "ext4"), ("/", "ext4")],
)
def test_file_systems_on_linux(place: str, expected: str) -> None:
    assert Mounts(parse_mountinfo(MOUNTINFO)).kind(Path(place)) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [("/Volumes/My share/store", "smbfs"), ("/Volumes/My", "apfs"), ("/x", "apfs")],
)
def test_file_systems_on_macos(place: str, expected: str) -> None:
    assert Mounts(parse_mount_command(MOUNT)).kind(Path(place)) == expected
    assert Mounts([]).kind(Path(place)) == ""


@pytest.mark.on_disk
def test_files_of_a_test_marked_on_disk_are_on_one(tmp_path: Path) -> None:
    assert Mounts().kind(tmp_path) not in ("tmpfs", "ramfs")
