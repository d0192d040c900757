//! TLS: the certificate and its key, and how they are exchanged while the server runs.
//!
//! Renewals write new files; they are looked at once a minute, so that nothing has to be told to the server. Files that
//! cannot be used change nothing but the log. Connections go on with what they began with.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::Context;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;

/// The files, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those of the authorities between it and the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What changes when a file is another: device, inode, size and time of change.
type FileIdentity = (u64, u64, u64, i64, i64);

impl TlsFiles {
    fn identity(&self) -> io::Result<[FileIdentity; 2]> {
        let identity = |path: &Path| {
            fs::metadata(path)
                .map(|file: Metadata| (file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec()))
        };
        Ok([identity(&self.certificate)?, identity(&self.key)?])
    }

    fn load(&self, provider: &CryptoProvider) -> anyhow::Result<CertifiedKey> {
        let within = |path: &Path| format!("cannot use {}", path.display());
        let chain = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| within(&self.certificate))?;
        anyhow::ensure!(!chain.is_empty(), "{} has no certificate", self.certificate.display());
        let key = PrivateKeyDer::from_pem_file(&self.key).with_context(|| within(&self.key))?;
        CertifiedKey::from_der(chain, key, provider)
            .with_context(|| format!("{} and {} do not fit", self.certificate.display(), self.key.display()))
    }
}

/// The certificate that is shown to clients.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    present: RwLock<Arc<CertifiedKey>>,
    seen: Mutex<[FileIdentity; 2]>,
}

impl Tls {
    /// Loads the files.
    ///
    /// # Errors
    /// They cannot be read or used.
    pub fn load(files: TlsFiles) -> anyhow::Result<Arc<Self>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let seen = files.identity().context("cannot read the certificate or its key")?;
        let present = RwLock::new(Arc::new(files.load(&provider)?));
        Ok(Arc::new(Self { files, provider, present, seen: Mutex::new(seen) }))
    }

    /// Loads the files again where they are others now; says whether it did.
    ///
    /// # Errors
    /// They cannot be used; the certificate stays the one from before.
    pub fn reload(&self) -> anyhow::Result<bool> {
        let now = self.files.identity()?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == now {
            return Ok(false);
        }
        let loaded = Arc::new(self.files.load(&self.provider)?);
        *self.present.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        *seen = now;
        Ok(true)
    }

    /// What accepts connections with it: TLS 1.2 and 1.3, HTTP/2 and HTTP/1.
    ///
    /// # Errors
    /// None that this provider has.
    pub fn acceptor(self: &Arc<Self>) -> anyhow::Result<TlsAcceptor> {
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ResolvesServerCert for Tls {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.present.read().unwrap_or_else(PoisonError::into_inner)))
    }
}
