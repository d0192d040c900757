//! Identities: what a CI job is, as a token says that its own service has signed (OpenID Connect). Rules say which
//! namespace such a job may use; it gets a session for that.
//!
//! ```toml
//! [[identity]]
//! issuer = "https://token.actions.githubusercontent.com"
//! audience = "https://cache.example.org"
//!
//! [[identity.rules]]
//! claims = { repository_id = "1234", ref = "refs/heads/main" }
//! namespace = "main"
//! allow = "read,write"
//!
//! [[identity.rules]]
//! claims = { repository_id = "1234", ref = "refs/pull/*/merge" }
//! namespace = "pr-*"                # with what stood in the place of the '*'
//! allow = "read,write"
//! ```
//!
//! Invariants: a signature is checked before any claim counts; every rule names whose jobs it is for by a claim that
//! nobody else can have.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::ensure;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore};

use crate::namespace::{Namespace, Pattern};
use crate::outbound;
use crate::tokens::Verbs;

/// Claims of which every rule has one: of whose jobs it is. A name can be given up and taken by somebody else; where only
/// names are known, the subject has them all.
const OWNER_CLAIMS: [&str; 5] = ["sub", "repository_id", "repository_owner_id", "project_id", "namespace_id"];

/// With keys of their own only: nothing that is signed with a shared secret.
const ALGORITHMS: [Algorithm; 4] = [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::ES256];

/// How long an issuer's keys are good, and how often they are asked for where one is missing.
const KEYS_LIFETIME: Duration = Duration::from_secs(60 * 60);
const KEYS_INTERVAL: Duration = Duration::from_secs(60);

/// Requests of one issuer's jobs that wait for its keys at a time.
const MAX_WAITING: usize = 32;

const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_DOCUMENT_BYTES: usize = 256 << 10;
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Seconds by which clocks may differ.
const LEEWAY_SECONDS: u64 = 60;

/// A service that signs tokens, and what its jobs may do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// Its URL, as its tokens have it.
    pub issuer: String,
    /// What its tokens must be made for.
    pub audience: String,
    /// Where its keys are, if its discovery document is not to be asked.
    pub jwks_url: Option<String>,
    /// What its jobs may do; the first rule that fits a job and a namespace counts.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// Which jobs may do what.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What the claims must be; one `*` in a value stands for anything.
    pub claims: BTreeMap<String, String>,
    /// The namespace; a `*` at its end is what the claims' `*` stands for.
    pub namespace: Pattern,
    /// What is allowed there.
    pub allow: Verbs,
}

impl Issuer {
    fn check(&self) -> anyhow::Result<()> {
        let issuer = &self.issuer;
        for url in [Some(issuer), self.jwks_url.as_ref()].into_iter().flatten() {
            ensure!(is_secure(url), "identity {issuer}: {url} is not an https URL");
        }
        ensure!(!self.rules.is_empty(), "identity {issuer} has no rules, and so is of no use");
        self.rules.iter().try_for_each(|rule| rule.check())
    }
}

/// Whether what is fetched from there is what its owner has written.
fn is_secure(url: &str) -> bool {
    url.starts_with("https://") || url.starts_with("http://127.0.0.1:")
}

impl Rule {
    fn check(&self) -> anyhow::Result<()> {
        let namespace = &self.namespace;
        let mut owners = OWNER_CLAIMS.iter().filter_map(|name| self.claims.get(*name));
        ensure!(
            owners.any(|value| !value.contains('*') && !value.is_empty()),
            "the identity rule for {namespace} must name whose jobs it is for, without a '*', by one of the claims {}",
            OWNER_CLAIMS.join(", ")
        );
        let stars = |value: &String| value.matches('*').count();
        ensure!(
            self.claims.values().all(|value| stars(value) < 2),
            "a claim of {namespace} has more than one '*'"
        );
        let starred = self.claims.values().filter(|value| stars(value) > 0).count();
        ensure!(
            namespace.exact().is_some() || starred == 1,
            "{namespace} ends with a '*', so exactly one claim of its identity rule must have one"
        );
        Ok(())
    }

    /// The namespace for a job, if the rule is for it.
    fn namespace_for(&self, claims: &HashMap<String, Value>) -> Option<Namespace> {
        let mut filled = "";
        for (name, wanted) in &self.claims {
            let value = claims.get(name)?;
            match (value, wanted.split_once('*')) {
                (Value::String(value), None) if value == wanted => {}
                (Value::String(value), Some((before, after))) => {
                    filled =
                        value.strip_prefix(before)?.strip_suffix(after).filter(|text| !text.is_empty())?;
                }
                (Value::Number(_) | Value::Bool(_), None)
                    if serde_json::from_str::<Value>(wanted).is_ok_and(|wanted| wanted == *value) => {}
                _ => return None,
            }
        }
        self.namespace.fill(filled)
    }
}

/// The issuers of one server, with their keys.
#[derive(Debug)]
pub struct Identities {
    issuers: Vec<(Issuer, Keys)>,
    client: reqwest::Client,
}

/// The keys of an issuer, with when they were fetched.
#[derive(Debug)]
struct Keys {
    present: RwLock<Option<(Arc<JwkSet>, Instant)>>,
    /// Held while they are fetched: by one at a time.
    tried: Mutex<Option<Instant>>,
    waiting: Semaphore,
}

impl Keys {
    fn new() -> Self {
        Self { present: RwLock::default(), tried: Mutex::default(), waiting: Semaphore::new(MAX_WAITING) }
    }

    fn present(&self) -> Option<(Arc<JwkSet>, Instant)> {
        self.present.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, set: JwkSet) {
        let mut present = self.present.write().unwrap_or_else(PoisonError::into_inner);
        *present = Some((Arc::new(set), Instant::now()));
    }

    /// Whether a key is known, and none of them too old.
    fn are_good_for(&self, id: &str) -> bool {
        self.present()
            .is_some_and(|(set, fetched)| fetched.elapsed() < KEYS_LIFETIME && set.find(id).is_some())
    }
}

/// An issuer's keys cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the issuer's keys cannot be fetched")]
pub struct Unreachable;

impl Identities {
    /// Who jobs may be.
    pub fn issuers(&self) -> impl Iterator<Item = &Issuer> {
        self.issuers.iter().map(|(issuer, _)| issuer)
    }

    /// Checks what the configuration says.
    ///
    /// # Errors
    /// A sentence about the rule that cannot be.
    pub fn new(issuers: Vec<Issuer>) -> anyhow::Result<Self> {
        issuers.iter().try_for_each(Issuer::check)?;
        for (number, issuer) in issuers.iter().enumerate() {
            let is_new = issuers.iter().take(number).all(|earlier| earlier.issuer != issuer.issuer);
            ensure!(is_new, "identity {} stands there twice; put its rules together", issuer.issuer);
        }
        let client = outbound::client(FETCH_TIMEOUT)?.build()?;
        let issuers = issuers.into_iter().map(|issuer| (issuer, Keys::new())).collect();
        Ok(Self { issuers, client })
    }

    /// What the bearer of a token may do in a namespace; `None` where that is nothing, or the token is not good.
    ///
    /// # Errors
    /// The keys to tell by cannot be had.
    pub async fn verbs(&self, token: &str, namespace: &Namespace) -> Result<Option<Verbs>, Unreachable> {
        let Some((issuer, keys)) = self.issuer_of(token) else { return Ok(None) };
        let Some(claims) = self.claims(token, issuer, keys).await? else { return Ok(None) };
        let fits = |rule: &&Rule| rule.namespace_for(&claims).is_some_and(|name| name == *namespace);
        Ok(issuer.rules.iter().find(fits).map(|rule| rule.allow))
    }

    /// The issuer that a token says it is of. Nothing is checked yet.
    fn issuer_of(&self, token: &str) -> Option<&(Issuer, Keys)> {
        #[derive(Deserialize)]
        struct Claimed {
            iss: String,
        }
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let claimed: Claimed = jsonwebtoken::dangerous::insecure_decode_claims(token).ok()?;
        self.issuers.iter().find(|(issuer, _)| issuer.issuer == claimed.iss)
    }

    /// The claims of a token, if it is good.
    async fn claims(
        &self,
        token: &str,
        issuer: &Issuer,
        keys: &Keys,
    ) -> Result<Option<HashMap<String, Value>>, Unreachable> {
        let Ok(header) = jsonwebtoken::decode_header(token) else { return Ok(None) };
        let Some(key_id) = header.kid.filter(|_| ALGORITHMS.contains(&header.alg)) else { return Ok(None) };
        let Some(key) = self.key(issuer, keys, &key_id).await? else { return Ok(None) };
        let mut validation = Validation::new(header.alg);
        validation.set_issuer(&[&issuer.issuer]);
        validation.set_audience(&[&issuer.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_SECONDS;
        let decoded = jsonwebtoken::decode(token, &key, &validation);
        Ok(decoded
            .inspect_err(|error| tracing::info!(%error, issuer = issuer.issuer, "a token is refused"))
            .ok()
            .map(|data| data.claims))
    }

    async fn key(&self, issuer: &Issuer, keys: &Keys, id: &str) -> Result<Option<DecodingKey>, Unreachable> {
        if !keys.are_good_for(id) {
            // Few wait for an answer that may not come; the others are told to come back.
            let _place = keys.waiting.try_acquire().map_err(|_| Unreachable)?;
            let mut tried = keys.tried.lock().await;
            let was_tried = tried.is_some_and(|tried| tried.elapsed() < KEYS_INTERVAL);
            if !was_tried && !keys.are_good_for(id) {
                *tried = Some(Instant::now());
                match self.fetch_keys(issuer).await {
                    Ok(set) => keys.set(set),
                    // Keys that were good an hour ago are better than none.
                    Err(error) => {
                        tracing::warn!(%error, issuer = issuer.issuer, "cannot fetch an issuer's keys");
                    }
                }
            }
        }
        let (set, _) = keys.present().ok_or(Unreachable)?;
        Ok(set.find(id).and_then(|key| DecodingKey::from_jwk(key).ok()))
    }

    async fn fetch_keys(&self, issuer: &Issuer) -> anyhow::Result<JwkSet> {
        #[derive(Deserialize)]
        struct Discovery {
            jwks_uri: String,
        }
        let url = match &issuer.jwks_url {
            Some(url) => url.clone(),
            None => {
                let url = format!("{}/.well-known/openid-configuration", issuer.issuer.trim_end_matches('/'));
                serde_json::from_slice::<Discovery>(&self.fetch(&url).await?)?.jwks_uri
            }
        };
        Ok(serde_json::from_slice(&self.fetch(&url).await?)?)
    }

    async fn fetch(&self, url: &str) -> anyhow::Result<Vec<u8>> {
        ensure!(is_secure(url), "{url} is not an https URL");
        let mut response = self.client.get(url).send().await?.error_for_status()?;
        let mut document = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            document.extend_from_slice(&chunk);
            ensure!(document.len() <= MAX_DOCUMENT_BYTES, "{url} is longer than {MAX_DOCUMENT_BYTES} bytes");
        }
        Ok(document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(claims: &str, namespace: &str) -> Rule {
        toml::from_str(&format!("claims = {{ {claims} }}\nnamespace = '{namespace}'\nallow = 'read'"))
            .unwrap()
    }

    #[test]
    fn a_rule_is_for_jobs_with_its_claims() {
        let claims = |text: &str| serde_json::from_str::<HashMap<String, Value>>(text).unwrap();
        let job =
            claims(r#"{"repository_id": "12", "ref": "refs/pull/7/merge", "runs": 3, "trusted": true}"#);
        let of = |text: &str, namespace: &str| rule(text, namespace).namespace_for(&job);
        let named = |name: &str| Some(name.parse::<Namespace>().unwrap());
        assert_eq!(of("repository_id = '12'", "main"), named("main"));
        assert_eq!(of("repository_id = '12', runs = '3', trusted = 'true'", "main"), named("main"));
        assert_eq!(of("repository_id = '12', ref = 'refs/pull/*/merge'", "pr-*"), named("pr-7"));
        for other in [
            "repository_id = '1'",
            "repository_id = '12', absent = ''",
            "repository_id = '12', ref = 'refs/heads/*'",
            "repository_id = '12', ref = 'refs/pull/7/merge*'",
            "repository_id = '12', runs = '*'",
        ] {
            assert_eq!(of(other, "main"), None, "{other}");
        }
        // What would not be a name is none.
        assert_eq!(of("repository_id = '12', ref = 'refs/*/merge'", "pr-*"), None);
    }

    #[test]
    fn rules_that_are_for_everybody_are_refused() {
        let check = |claims: &str, namespace: &str| {
            rule(claims, namespace).check().map_err(|error| error.to_string())
        };
        assert_eq!(check("repository_id = '12'", "main"), Ok(()));
        assert_eq!(check("sub = 'repo:a/b:ref:refs/heads/main'", "main"), Ok(()));
        for (claims, namespace, hint) in [
            ("ref = 'refs/heads/main'", "main", "repository_id"),
            ("repository_id = '*'", "main", "without a '*'"),
            ("sub = 'repo:*'", "pr-*", "without a '*'"),
            ("repository_id = '1', ref = '*a*'", "main", "more than one"),
            ("repository_id = '1'", "pr-*", "exactly one claim"),
            ("repository_id = '1', a = 'x*', b = 'y*'", "pr-*", "exactly one claim"),
        ] {
            let error = check(claims, namespace).unwrap_err();
            assert!(error.contains(hint), "{claims}: {error}");
        }
        let issuer = |url: &str| Issuer {
            issuer: url.to_owned(),
            audience: "a".to_owned(),
            jwks_url: None,
            rules: vec![rule("sub = 'x'", "main")],
        };
        assert!(issuer("https://ci.example.org").check().is_ok());
        assert!(issuer("http://ci.example.org").check().is_err());
        assert!(Issuer { rules: vec![], ..issuer("https://ci.example.org") }.check().is_err());
    }
}
