//! What keeps a failing backend from taking others with it, as state machines: the clock and random numbers come in as
//! arguments, and nothing waits.

mod breaker;
mod budget;
mod fault;
mod limit;
mod outlier;
mod retry;

pub use breaker::{Breaker, Full, Limits};
pub use budget::{Budget, BudgetRules};
pub use fault::{Abort, Fault, FaultRules};
pub use limit::{Bucket, Rate};
pub use outlier::{OutlierRules, Outliers};
pub use retry::{Outcome, RetryRules, Tries};

#[cfg(test)]
mod simulation;
