"""DICOM files made by pydicom are read as grey pixels; what is no single grey radiograph is refused by name."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, generate_uid

from workbench import WorkbenchError
from workbench.data import radiographs

RAMP = np.arange(64 * 48).reshape(48, 64)


def write(path, values, *, bits=16, stored=None, signed=False, kind="MONOCHROME2", **more):
    """A DICOM file of computed radiography that holds `values`."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = (3 if values.ndim == 3 else 1), kind
    file.BitsAllocated, file.BitsStored = bits, stored or bits
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(signed)
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    file.PixelData = values.astype(f"{'i' if signed else 'u'}{bits // 8}").tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


def test_eight_bits_with_the_whole_window_stay_as_they_are(tmp_path):
    values = (RAMP % 256).astype(np.uint8)
    path = write(tmp_path / "a.dcm", values, bits=8, WindowCenter=128, WindowWidth=256)
    np.testing.assert_array_equal(radiographs.read_radiograph(path), values)


@pytest.mark.parametrize(("stored", "top"), [(12, 4095), (16, 65535)])
def test_a_window_cuts_and_stretches(tmp_path, stored, top):
    values = np.linspace(0, top, 48 * 64).round().reshape(48, 64)
    centre, width = top // 2, top // 4
    path = write(tmp_path / "a.dcm", values, stored=stored, WindowCenter=centre, WindowWidth=width)
    expected = 255 * np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)  # PS3.3 C.11.2.1.2
    assert np.abs(radiographs.read_radiograph(path) - expected).max() <= 0.51


def test_without_a_window_the_range_is_stretched(tmp_path):
    pixels = radiographs.read_radiograph(write(tmp_path / "a.dcm", 1000 + RAMP, stored=14))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels - 255 * RAMP / RAMP.max()).max() <= 0.51


def test_monochrome1_is_inverted(tmp_path):
    one = radiographs.read_radiograph(write(tmp_path / "1.dcm", RAMP, kind="MONOCHROME1"))
    two = radiographs.read_radiograph(write(tmp_path / "2.dcm", RAMP))
    assert np.abs(255 - one.astype(int) - two).max() <= 1
    assert one[0, 0] == 255


def test_rescale_and_signed_values(tmp_path):
    values = RAMP - 1500
    plain = radiographs.read_radiograph(write(tmp_path / "p.dcm", RAMP, WindowCenter=1500.5, WindowWidth=1001))
    path = write(tmp_path / "s.dcm", values, signed=True, WindowCenter=0.5, WindowWidth=1001)
    assert np.abs(radiographs.read_radiograph(path).astype(int) - plain).max() <= 1
    path = write(tmp_path / "r.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-3000, WindowCenter=0.5, WindowWidth=2001)
    assert np.abs(radiographs.read_radiograph(path).astype(int) - plain).max() <= 1


def test_several_windows_take_the_first(tmp_path):
    one = write(tmp_path / "1.dcm", RAMP, WindowCenter=800, WindowWidth=500)
    several = write(tmp_path / "2.dcm", RAMP, WindowCenter=[800, 2000], WindowWidth=[500, 100])
    np.testing.assert_array_equal(radiographs.read_radiograph(one), radiographs.read_radiograph(several))


def test_what_is_no_single_grey_radiograph_is_refused(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP)
    file = pydicom.dcmread(path)
    del file.PixelData
    file.save_as(path)
    with pytest.raises(WorkbenchError, match=r"a\.dcm` is a DICOM file without pixels"):
        radiographs.read_radiograph(path)
    colour = write(tmp_path / "b.dcm", np.zeros((8, 8, 3)), bits=8, kind="RGB")
    with pytest.raises(WorkbenchError, match=r"in colour \(RGB\)"):
        radiographs.read_radiograph(colour)
    several = write(tmp_path / "c.dcm", RAMP, NumberOfFrames=3)
    with pytest.raises(WorkbenchError, match="of 3 frames"):
        radiographs.read_radiograph(several)
    cut = write(tmp_path / "d.dcm", RAMP, PixelData=b"\0\0" * 10)
    with pytest.raises(WorkbenchError, match="pixels cannot be read"):
        radiographs.read_radiograph(cut)


def test_a_compression_that_nobody_reads_is_said(tmp_path):
    file = pydicom.dcmread(write(tmp_path / "a.dcm", RAMP))
    file.file_meta.TransferSyntaxUID = JPEG2000
    file.PixelData = pydicom.encaps.encapsulate([b"\0" * 100])
    file["PixelData"].VR = "OB"
    file.save_as(tmp_path / "b.dcm")
    with pytest.raises(WorkbenchError, match=r"b\.dcm` is a DICOM file whose pixels cannot be read .*uncompressed"):
        radiographs.read_radiograph(tmp_path / "b.dcm")


def test_absurdly_many_pixels_are_refused_before_any_is_decoded(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, Rows=65535, Columns=65535)
    with pytest.raises(WorkbenchError, match=r"a.dcm` claims 4,294,836,225 pixels"):
        radiographs.read_radiograph(path)


@pytest.mark.parametrize("slope", ["nan", "inf", "1e300"])
def test_a_rescaling_that_is_not_finite_is_refused(tmp_path, slope):
    path = write(tmp_path / "a.dcm", RAMP, RescaleSlope="1", RescaleIntercept="0")
    encoded = path.read_bytes().replace(b"DS\x02\x001 ", b"DS\x06\x00" + slope.ljust(6).encode(), 1)
    path.write_bytes(encoded)
    if slope == "1e300":
        assert radiographs.read_radiograph(path).shape == RAMP.shape
        return
    with pytest.raises(WorkbenchError, match=r"a\.dcm` is a DICOM file whose pixels cannot be read"):
        radiographs.read_radiograph(path)


def test_more_pixels_than_one_frame_has_are_refused(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP)
    file = pydicom.dcmread(path)
    file.Rows //= 3  # what is left over would be read as two more frames
    file.save_as(path)
    with pytest.raises(
        WorkbenchError, match=r"a\.dcm` is a DICOM file whose pixels cannot be read \(pixels of the shape"
    ):
        radiographs.read_radiograph(path)


def test_a_window_without_the_bits_it_is_over_is_refused(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter="100", WindowWidth="0")
    with pytest.raises(WorkbenchError, match=r"a\.dcm` is a DICOM file whose pixels cannot be read"):
        radiographs.read_radiograph(path)
