//! Whether an object that is gone was taken away, or went with the definition of its kind.

use std::time::Duration;

use ::kube::Client;
use ::kube::core::PartialObjectMeta;
use ::kube::{Api, Error};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::source::decode::Kind;

/// The CustomResourceDefinition of a kind of policy. Deleting it deletes every policy, and nobody who does that means
/// to let everybody in: so policies that go with it stay in force.
pub(super) struct Definition(Option<String>);

impl Definition {
    /// Of other kinds a deletion is what it says.
    pub fn of(kind: Kind, path: &str) -> Self {
        let plural = path.rsplit('/').next().unwrap_or_default();
        Self(kind.is_policy().then(|| format!("{plural}.{}", crate::api::GROUP)))
    }

    /// Whether the definition is there to stay. Asks until there is an answer: meanwhile what is known is in force.
    pub async fn stands(&self, client: &Client) -> bool {
        let Some(name) = &self.0 else { return true };
        let definitions: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(client.clone());
        let mut pause = FIRST_PAUSE;
        loop {
            match timeout(ANSWER_LIMIT, definitions.get(name)).await {
                Ok(Ok(found)) => return found.metadata.deletion_timestamp.is_none(),
                Ok(Err(Error::Api(status))) if status.code == 404 => return false,
                // Without the right to ask, a deletion is what it says.
                Ok(Err(Error::Api(status))) if status.code == 403 => {
                    warn!(
                        definition = name,
                        cause = status.message,
                        "It cannot be asked whether a policy was deleted by itself."
                    );
                    return true;
                }
                Ok(Err(error)) => {
                    warn!(definition = name, %error, "It is not known whether a policy was deleted by itself; it stays in force until that is known.")
                }
                Err(_) => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
