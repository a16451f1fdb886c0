//! eif-peer builds and reads enclave image files with AWS's library, so that ours can be compared with it.
//!
//!     eif-peer build METADATA OUTPUT KERNEL CMDLINE ARCH KEY CERTIFICATE RAMDISK...
//!     eif-peer read FILE
//!
//! METADATA is a file with all of an EIF's metadata; ARCH is x86_64 or aarch64; KEY and CERTIFICATE are PEM
//! files, or - for none. Both print the measurements as JSON. read fails if the checksum or the signature is
//! wrong, as AWS's describe-eif and run-enclave find it.

use std::path::Path;

use aws_nitro_enclaves_image_format::defs::{EifIdentityInfo, EIF_HDR_ARCH_ARM64};
use aws_nitro_enclaves_image_format::utils::eif_reader::EifReader;
use aws_nitro_enclaves_image_format::utils::{EifBuilder, PcrSignatureChecker, SignKeyData};
use sha2::{Digest, Sha384};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let measurements = match args.as_slice() {
        ["build", metadata, output, kernel, cmdline, arch, key, certificate, ramdisks @ ..] => {
            let info: EifIdentityInfo = serde_json::from_slice(&std::fs::read(metadata)?)?;
            let signer = match *key {
                "-" => None,
                key => Some(SignKeyData::new(key, Path::new(certificate))?),
            };
            let flags = if *arch == "aarch64" { EIF_HDR_ARCH_ARM64 } else { 0 };
            let mut builder = EifBuilder::new(Path::new(kernel), cmdline.to_string(), signer, Sha384::new(), flags, info);
            for ramdisk in ramdisks {
                builder.add_ramdisk(Path::new(ramdisk));
            }
            builder.write_to(&mut std::fs::File::create(output)?)
        }
        ["read", file] => {
            let mut reader = EifReader::from_eif(file.to_string())?;
            if !reader.check_crc() {
                return Err("the checksum is wrong".into());
            }
            let measurements = reader.get_measurements()?;
            if reader.signature_section.is_some() {
                reader.get_certificate_info(measurements.clone())?;
                if reader.sign_check != Some(true) {
                    return Err("the signature is not over PCR0".into());
                }
                PcrSignatureChecker::from_eif(file)?.verify()?;
            }
            eprintln!("{}", serde_json::to_string(&reader.get_metadata())?);
            measurements
        }
        _ => return Err("usage: see the source".into()),
    };
    println!("{}", serde_json::to_string(&measurements)?);
    Ok(())
}
