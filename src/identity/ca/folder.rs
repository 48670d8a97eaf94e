use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::identity::CaError;
use crate::identity::signer::NewRoot;
use crate::mesh::TrustDomain;

/// The folder that holds `ca.crt` and `ca.key`.
pub(super) struct Folder {
    dir: PathBuf,
}

/// What the two files say.
pub(super) struct Pair {
    pub certificates: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
}

impl Folder {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub fn certificate_path(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    fn key_path(&self) -> PathBuf {
        self.dir.join("ca.key")
    }

    /// The pair; where there is none, a new one.
    ///
    /// `ca.crt` is renamed into place last, so whoever sees it sees a whole pair; the lock lets one of several agents
    /// make it. Half a pair is never completed: a new root in place of a lost one would split the mesh.
    pub fn read_or_create(&self, trust_domain: &TrustDomain) -> Result<Pair, CaError> {
        if self.certificate_path().exists() && self.key_path().exists() {
            return self.read();
        }
        fs::create_dir_all(&self.dir).map_err(|error| wrong(&self.dir, &error, "Create it, or name another folder"))?;
        let lock = self.dir.join(".ca.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock)
            .map_err(|error| wrong(&lock, &error, "The agent must be able to write there, to make a CA"))?;
        let _held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| wrong(&lock, &error.into(), "Its file system must support flock"))?;
        match (self.certificate_path().exists(), self.key_path().exists()) {
            (true, true) => {}
            (false, false) => self.create(trust_domain)?,
            (true, false) => {
                return Err(half(
                    &self.key_path(),
                    "Restore the key of ca.crt, or remove ca.crt to have a new CA made, which no peer of the old one trusts",
                ));
            }
            (false, true) => {
                return Err(half(
                    &self.certificate_path(),
                    "Restore the certificate of ca.key, or remove ca.key to have a new CA made, which no peer of the old one trusts",
                ));
            }
        }
        self.read()
    }

    pub fn read(&self) -> Result<Pair, CaError> {
        let (certificate_path, key_path) = (self.certificate_path(), self.key_path());
        let mode = fs::metadata(&key_path).map_err(|error| wrong(&key_path, &error, "Restore it"))?.mode();
        if mode & 0o077 != 0 {
            let cause = format!("its mode is {:o}: others than its owner may use the CA's key", mode & 0o7777);
            return Err(CaError::File { file: key_path.display().to_string(), cause, cure: "chmod 600 it" });
        }
        let pem = fs::read(&certificate_path).map_err(|error| wrong(&certificate_path, &error, "Restore it"))?;
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| {
            let cause = format!("{error:?}");
            CaError::File { file: certificate_path.display().to_string(), cause, cure: "It must be PEM certificates" }
        })?;
        let key = fs::read_to_string(&key_path).map_err(|error| wrong(&key_path, &error, "It must be PEM"))?;
        let key = KeyPair::from_pem(&key).map_err(|error| CaError::File {
            file: key_path.display().to_string(),
            cause: error.to_string(),
            cure: "It must be one PKCS #8 private key in PEM (openssl pkcs8 -topk8 -nocrypt converts others)",
        })?;
        Ok(Pair { certificates, key })
    }

    /// What changes when a file does: inode, length and time of change of both.
    pub fn stamp(&self) -> [Option<(u64, u64, i64, i64)>; 2] {
        [self.certificate_path(), self.key_path()].map(|path| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec()))
        })
    }

    fn create(&self, trust_domain: &TrustDomain) -> Result<(), CaError> {
        let root = NewRoot::make(trust_domain, SystemTime::now())?;
        self.place(&self.key_path(), root.key.as_bytes(), 0o600)?;
        self.place(&self.certificate_path(), root.certificate.as_bytes(), 0o644)?;
        tracing::info!(folder = %self.dir.display(), %trust_domain, "Made a new CA.");
        Ok(())
    }

    fn place(&self, path: &Path, content: &[u8], mode: u32) -> Result<(), CaError> {
        let written = || -> io::Result<()> {
            let draft = path.with_extension("new");
            // A draft that a crash left behind is nobody's: the lock is ours.
            match fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&draft, path)?;
            File::open(&self.dir)?.sync_all()
        };
        written().map_err(|error| wrong(path, &error, "The agent must be able to write there, to make a CA"))
    }
}

fn wrong(path: &Path, error: &io::Error, cure: &'static str) -> CaError {
    CaError::File { file: path.display().to_string(), cause: error.to_string(), cure }
}

fn half(missing: &Path, cure: &'static str) -> CaError {
    CaError::File { file: missing.display().to_string(), cause: "it is missing beside its other half".to_owned(), cure }
}
