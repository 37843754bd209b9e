//! The tags that are read or written, by their names in the standard (PS3.6).

use std::fmt;

/// A tag that is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub group: u16,
    pub element: u16,
    /// How the tag's value is encoded: if a file does not say, and in what is written.
    pub vr: [u8; 2],
    name: &'static str,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({:04x},{:04x})", self.name, self.group, self.element)
    }
}

/// Makes constants of tags.
macro_rules! tags {
    ($($constant:ident $group:literal $element:literal $vr:literal $name:literal;)*) => {
        $(
            #[doc = $name]
            pub const $constant: Tag =
                Tag { group: $group, element: $element, vr: *$vr, name: $name };
        )*
    };
}

tags! {
    META_LENGTH 0x0002 0x0000 b"UL" "FileMetaInformationGroupLength";
    META_VERSION 0x0002 0x0001 b"OB" "FileMetaInformationVersion";
    META_CLASS 0x0002 0x0002 b"UI" "MediaStorageSOPClassUID";
    META_INSTANCE 0x0002 0x0003 b"UI" "MediaStorageSOPInstanceUID";
    TRANSFER_SYNTAX 0x0002 0x0010 b"UI" "TransferSyntaxUID";
    IMPLEMENTATION_CLASS 0x0002 0x0012 b"UI" "ImplementationClassUID";
    IMPLEMENTATION_VERSION 0x0002 0x0013 b"SH" "ImplementationVersionName";
    CHARACTER_SET 0x0008 0x0005 b"CS" "SpecificCharacterSet";
    IMAGE_TYPE 0x0008 0x0008 b"CS" "ImageType";
    CREATION_DATE 0x0008 0x0012 b"DA" "InstanceCreationDate";
    CREATION_TIME 0x0008 0x0013 b"TM" "InstanceCreationTime";
    SOP_CLASS 0x0008 0x0016 b"UI" "SOPClassUID";
    SOP_INSTANCE 0x0008 0x0018 b"UI" "SOPInstanceUID";
    STUDY_DATE 0x0008 0x0020 b"DA" "StudyDate";
    SERIES_DATE 0x0008 0x0021 b"DA" "SeriesDate";
    ACQUISITION_DATE 0x0008 0x0022 b"DA" "AcquisitionDate";
    CONTENT_DATE 0x0008 0x0023 b"DA" "ContentDate";
    STUDY_TIME 0x0008 0x0030 b"TM" "StudyTime";
    SERIES_TIME 0x0008 0x0031 b"TM" "SeriesTime";
    ACQUISITION_TIME 0x0008 0x0032 b"TM" "AcquisitionTime";
    CONTENT_TIME 0x0008 0x0033 b"TM" "ContentTime";
    ACCESSION_NUMBER 0x0008 0x0050 b"SH" "AccessionNumber";
    MODALITY 0x0008 0x0060 b"CS" "Modality";
    MANUFACTURER 0x0008 0x0070 b"LO" "Manufacturer";
    REFERRING_PHYSICIAN 0x0008 0x0090 b"PN" "ReferringPhysicianName";
    CODE_VALUE 0x0008 0x0100 b"SH" "CodeValue";
    CODING_SCHEME 0x0008 0x0102 b"SH" "CodingSchemeDesignator";
    CODE_MEANING 0x0008 0x0104 b"LO" "CodeMeaning";
    TIMEZONE 0x0008 0x0201 b"SH" "TimezoneOffsetFromUTC";
    STUDY_DESCRIPTION 0x0008 0x1030 b"LO" "StudyDescription";
    SERIES_DESCRIPTION 0x0008 0x103e b"LO" "SeriesDescription";
    MODEL_NAME 0x0008 0x1090 b"LO" "ManufacturerModelName";
    REFERENCED_SERIES 0x0008 0x1115 b"SQ" "ReferencedSeriesSequence";
    REFERENCED_INSTANCES 0x0008 0x114a b"SQ" "ReferencedInstanceSequence";
    REFERENCED_CLASS 0x0008 0x1150 b"UI" "ReferencedSOPClassUID";
    REFERENCED_INSTANCE 0x0008 0x1155 b"UI" "ReferencedSOPInstanceUID";
    REFERENCED_FRAME 0x0008 0x1160 b"IS" "ReferencedFrameNumber";
    SOURCE_IMAGE 0x0008 0x2112 b"SQ" "SourceImageSequence";
    DERIVATION_IMAGE 0x0008 0x9124 b"SQ" "DerivationImageSequence";
    DERIVATION_CODE 0x0008 0x9215 b"SQ" "DerivationCodeSequence";
    PATIENT_NAME 0x0010 0x0010 b"PN" "PatientName";
    PATIENT_ID 0x0010 0x0020 b"LO" "PatientID";
    PATIENT_ISSUER 0x0010 0x0021 b"LO" "IssuerOfPatientID";
    PATIENT_BIRTH 0x0010 0x0030 b"DA" "PatientBirthDate";
    PATIENT_SEX 0x0010 0x0040 b"CS" "PatientSex";
    PATIENT_AGE 0x0010 0x1010 b"AS" "PatientAge";
    PATIENT_SIZE 0x0010 0x1020 b"DS" "PatientSize";
    PATIENT_WEIGHT 0x0010 0x1030 b"DS" "PatientWeight";
    IDENTITY_REMOVED 0x0012 0x0062 b"CS" "PatientIdentityRemoved";
    DEIDENTIFICATION 0x0012 0x0063 b"LO" "DeidentificationMethod";
    DEIDENTIFICATION_CODES 0x0012 0x0064 b"SQ" "DeidentificationMethodCodeSequence";
    SLICE_THICKNESS 0x0018 0x0050 b"DS" "SliceThickness";
    SPACING_BETWEEN_SLICES 0x0018 0x0088 b"DS" "SpacingBetweenSlices";
    DEVICE_SERIAL 0x0018 0x1000 b"LO" "DeviceSerialNumber";
    SOFTWARE_VERSIONS 0x0018 0x1020 b"LO" "SoftwareVersions";
    START_TIME 0x0018 0x1072 b"TM" "RadiopharmaceuticalStartTime";
    TOTAL_DOSE 0x0018 0x1074 b"DS" "RadionuclideTotalDose";
    HALF_LIFE 0x0018 0x1075 b"DS" "RadionuclideHalfLife";
    START_DATE_TIME 0x0018 0x1078 b"DT" "RadiopharmaceuticalStartDateTime";
    CONTRIBUTING_EQUIPMENT 0x0018 0xa001 b"SQ" "ContributingEquipmentSequence";
    STUDY_INSTANCE 0x0020 0x000d b"UI" "StudyInstanceUID";
    SERIES_INSTANCE 0x0020 0x000e b"UI" "SeriesInstanceUID";
    STUDY_ID 0x0020 0x0010 b"SH" "StudyID";
    SERIES_NUMBER 0x0020 0x0011 b"IS" "SeriesNumber";
    ACQUISITION_NUMBER 0x0020 0x0012 b"IS" "AcquisitionNumber";
    INSTANCE_NUMBER 0x0020 0x0013 b"IS" "InstanceNumber";
    POSITION 0x0020 0x0032 b"DS" "ImagePositionPatient";
    ORIENTATION 0x0020 0x0037 b"DS" "ImageOrientationPatient";
    FRAME_OF_REFERENCE 0x0020 0x0052 b"UI" "FrameOfReferenceUID";
    TEMPORAL_POSITION 0x0020 0x0100 b"IS" "TemporalPositionIdentifier";
    POSITION_REFERENCE 0x0020 0x1040 b"LO" "PositionReferenceIndicator";
    FRAME_CONTENT 0x0020 0x9111 b"SQ" "FrameContentSequence";
    PLANE_POSITION 0x0020 0x9113 b"SQ" "PlanePositionSequence";
    PLANE_ORIENTATION 0x0020 0x9116 b"SQ" "PlaneOrientationSequence";
    TEMPORAL_INDEX 0x0020 0x9128 b"UL" "TemporalPositionIndex";
    FRAME_ACQUISITION 0x0020 0x9156 b"US" "FrameAcquisitionNumber";
    INDEX_VALUES 0x0020 0x9157 b"UL" "DimensionIndexValues";
    ORGANIZATION_UID 0x0020 0x9164 b"UI" "DimensionOrganizationUID";
    INDEX_POINTER 0x0020 0x9165 b"AT" "DimensionIndexPointer";
    GROUP_POINTER 0x0020 0x9167 b"AT" "FunctionalGroupPointer";
    ORGANIZATION 0x0020 0x9221 b"SQ" "DimensionOrganizationSequence";
    DIMENSIONS 0x0020 0x9222 b"SQ" "DimensionIndexSequence";
    DIMENSION_LABEL 0x0020 0x9421 b"LO" "DimensionDescriptionLabel";
    SAMPLES 0x0028 0x0002 b"US" "SamplesPerPixel";
    PHOTOMETRIC 0x0028 0x0004 b"CS" "PhotometricInterpretation";
    FRAMES 0x0028 0x0008 b"IS" "NumberOfFrames";
    ROWS 0x0028 0x0010 b"US" "Rows";
    COLUMNS 0x0028 0x0011 b"US" "Columns";
    PIXEL_SPACING 0x0028 0x0030 b"DS" "PixelSpacing";
    CORRECTED_IMAGE 0x0028 0x0051 b"CS" "CorrectedImage";
    BITS_ALLOCATED 0x0028 0x0100 b"US" "BitsAllocated";
    BITS_STORED 0x0028 0x0101 b"US" "BitsStored";
    HIGH_BIT 0x0028 0x0102 b"US" "HighBit";
    PIXEL_REPRESENTATION 0x0028 0x0103 b"US" "PixelRepresentation";
    LONGITUDINAL 0x0028 0x0303 b"CS" "LongitudinalTemporalInformationModified";
    INTERCEPT 0x0028 0x1052 b"DS" "RescaleIntercept";
    SLOPE 0x0028 0x1053 b"DS" "RescaleSlope";
    LOCATIONS_PRESERVED 0x0028 0x135a b"CS" "SpatialLocationsPreserved";
    LOSSY 0x0028 0x2110 b"CS" "LossyImageCompression";
    LOSSY_RATIO 0x0028 0x2112 b"DS" "LossyImageCompressionRatio";
    LOSSY_METHOD 0x0028 0x2114 b"CS" "LossyImageCompressionMethod";
    PIXEL_MEASURES 0x0028 0x9110 b"SQ" "PixelMeasuresSequence";
    VALUE_TRANSFORMATION 0x0028 0x9145 b"SQ" "PixelValueTransformationSequence";
    PURPOSE 0x0040 0xa170 b"SQ" "PurposeOfReferenceCodeSequence";
    RADIOPHARMACEUTICAL 0x0054 0x0016 b"SQ" "RadiopharmaceuticalInformationSequence";
    UNITS 0x0054 0x1001 b"CS" "Units";
    DECAY_CORRECTION 0x0054 0x1102 b"CS" "DecayCorrection";
    SEGMENTATION_TYPE 0x0062 0x0001 b"CS" "SegmentationType";
    SEGMENTS 0x0062 0x0002 b"SQ" "SegmentSequence";
    SEGMENT_CATEGORY 0x0062 0x0003 b"SQ" "SegmentedPropertyCategoryCodeSequence";
    SEGMENT_NUMBER 0x0062 0x0004 b"US" "SegmentNumber";
    SEGMENT_LABEL 0x0062 0x0005 b"LO" "SegmentLabel";
    ALGORITHM_TYPE 0x0062 0x0008 b"CS" "SegmentAlgorithmType";
    ALGORITHM_NAME 0x0062 0x0009 b"LO" "SegmentAlgorithmName";
    SEGMENT_IDENTIFICATION 0x0062 0x000a b"SQ" "SegmentIdentificationSequence";
    REFERENCED_SEGMENT 0x0062 0x000b b"US" "ReferencedSegmentNumber";
    SEGMENT_COLOUR 0x0062 0x000d b"US" "RecommendedDisplayCIELabValue";
    LARGEST_FRACTION 0x0062 0x000e b"US" "MaximumFractionalValue";
    SEGMENT_KIND 0x0062 0x000f b"SQ" "SegmentedPropertyTypeCodeSequence";
    FRACTIONAL_TYPE 0x0062 0x0010 b"CS" "SegmentationFractionalType";
    SEGMENTS_OVERLAP 0x0062 0x0013 b"CS" "SegmentsOverlap";
    CONTENT_LABEL 0x0070 0x0080 b"CS" "ContentLabel";
    CONTENT_DESCRIPTION 0x0070 0x0081 b"LO" "ContentDescription";
    CONTENT_CREATOR 0x0070 0x0084 b"PN" "ContentCreatorName";
    REFERENCED_FRAMES_OF_REFERENCE 0x3006 0x0010 b"SQ" "ReferencedFrameOfReferenceSequence";
    ROIS 0x3006 0x0020 b"SQ" "StructureSetROISequence";
    ROI_NUMBER 0x3006 0x0022 b"IS" "ROINumber";
    ROI_NAME 0x3006 0x0026 b"LO" "ROIName";
    ROI_CONTOURS 0x3006 0x0039 b"SQ" "ROIContourSequence";
    CONTOURS 0x3006 0x0040 b"SQ" "ContourSequence";
    CONTOUR_TYPE 0x3006 0x0042 b"CS" "ContourGeometricType";
    CONTOUR_DATA 0x3006 0x0050 b"DS" "ContourData";
    REFERENCED_ROI 0x3006 0x0084 b"IS" "ReferencedROINumber";
    SHARED_GROUPS 0x5200 0x9229 b"SQ" "SharedFunctionalGroupsSequence";
    FRAME_GROUPS 0x5200 0x9230 b"SQ" "PerFrameFunctionalGroupsSequence";
    PIXEL_DATA 0x7fe0 0x0010 b"OW" "PixelData";
    PIXEL_DATA_BYTES 0x7fe0 0x0010 b"OB" "PixelData";
}
