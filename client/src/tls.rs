//! TLS: rustls with the certificate authorities that `SSL_CERT_FILE` or `SSL_CERT_DIR` name (cargo sets
//! these to the system's for what it starts), or else those built in: a container may have none.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

/// A client configuration for HTTP/2 and HTTP/1.1.
pub(crate) fn client_config() -> ClientConfig {
    let mut roots = RootCertStore::empty();
    if ["SSL_CERT_FILE", "SSL_CERT_DIR"].iter().any(|name| std::env::var_os(name).is_some()) {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = match ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()
    {
        Ok(builder) => builder.with_root_certificates(roots).with_no_client_auth(),
        Err(error) => unreachable!("the provider supports the default versions: {error}"),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}
