//! A certificate authority that lives as long as its server.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer};

pub(crate) struct Identity {
    pub(crate) config: Arc<ServerConfig>,
    /// Certificate of the authority.
    pub(crate) ca_pem: String,
}

/// Makes an authority and a certificate for `localhost` and `127.0.0.1`.
pub(crate) fn identity() -> Result<Identity, Box<dyn std::error::Error>> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "scripted server's authority");
    let ca_key = KeyPair::generate()?;
    let ca_pem = params.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(params, ca_key);

    let key = KeyPair::generate()?;
    let names = ["localhost".into(), "127.0.0.1".into()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der())?;
    let config = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok(Identity {
        config: Arc::new(config),
        ca_pem,
    })
}
