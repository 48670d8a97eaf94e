//! Bearer tokens, as the API server judges them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{Api, PostParams};
use kube::{Client, Error};

/// Asks the API server whose a token is.
///
/// An agent that starts brings one token for all of its pods' identities: what was found is remembered for a moment. No
/// token is kept, only its hash.
pub struct Tokens {
    client: Client,
    audience: String,
    found: Mutex<HashMap<[u8; 32], (Instant, TokenReviewStatus)>>,
}

impl Tokens {
    pub fn new(client: Client, audience: &str) -> Self {
        Self { client, audience: audience.to_owned(), found: Mutex::default() }
    }

    /// # Errors
    /// The API server cannot be asked. What it says of a bad token is no error.
    pub async fn review(&self, token: &str) -> Result<TokenReviewStatus, Error> {
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        {
            let mut found = self.found();
            found.retain(|_, (since, _)| since.elapsed() < REMEMBERED);
            if let Some((_, status)) = found.get(&key) {
                return Ok(status.clone());
            }
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![self.audience.clone()]) },
            ..TokenReview::default()
        };
        let review = Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        let status = review.status.unwrap_or_default();
        let mut found = self.found();
        // Only what is genuine: whoever makes tokens up must not fill our memory.
        if status.authenticated == Some(true) && found.len() < MOST {
            found.insert(key, (Instant::now(), status.clone()));
        }
        Ok(status)
    }

    fn found(&self) -> MutexGuard<'_, HashMap<[u8; 32], (Instant, TokenReviewStatus)>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a token may outlive its pod here.
const REMEMBERED: Duration = Duration::from_secs(5);
const MOST: usize = 10_000;
