//! How much one backend is given at once.

/// `circuitBreaker`; what is absent is no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    pub connections: Option<u32>,
    /// Requests that wait for a connection.
    pub pending: Option<u32>,
    /// Requests under way, those that wait among them.
    pub requests: Option<u32>,
}

/// What one backend holds of the requests of one client namespace. Whoever begins something ends it too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Breaker {
    connections: u32,
    pending: u32,
    requests: u32,
}

/// What there is too much of: the request is answered with 503.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Full {
    Connections,
    Pending,
    Requests,
}

impl Full {
    /// As a sentence has it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "requests that wait for a connection",
            Self::Requests => "requests under way",
        }
    }

    /// One word, for a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "pending",
            Self::Requests => "requests",
        }
    }
}

impl Breaker {
    /// A request begins to wait for a connection.
    pub fn wait(&mut self, limits: &Limits) -> Result<(), Full> {
        take(&mut self.pending, limits.pending, Full::Pending)
    }

    /// A request is under way.
    pub fn begin(&mut self, limits: &Limits) -> Result<(), Full> {
        take(&mut self.requests, limits.requests, Full::Requests)
    }

    /// It waits no more.
    pub fn give_up(&mut self) {
        self.pending = self.pending.saturating_sub(1);
    }

    /// Its last byte has gone.
    pub fn end(&mut self) {
        self.requests = self.requests.saturating_sub(1);
    }

    pub fn open(&mut self, limits: &Limits) -> Result<(), Full> {
        take(&mut self.connections, limits.connections, Full::Connections)
    }

    pub fn close(&mut self) {
        self.connections = self.connections.saturating_sub(1);
    }

    /// Whether it need be remembered.
    pub fn is_idle(&self) -> bool {
        *self == Self::default()
    }
}

fn take(held: &mut u32, limit: Option<u32>, full: Full) -> Result<(), Full> {
    if limit.is_some_and(|limit| *held >= limit) {
        return Err(full);
    }
    *held = held.saturating_add(1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_a_limit_is_refused_and_what_ends_makes_room() {
        let limits = Limits { connections: Some(1), pending: Some(2), requests: Some(1) };
        let mut breaker = Breaker::default();
        assert_eq!(breaker.open(&limits), Ok(()));
        assert_eq!(breaker.open(&limits), Err(Full::Connections));
        assert_eq!([breaker.wait(&limits), breaker.wait(&limits)], [Ok(()), Ok(())]);
        assert_eq!(breaker.wait(&limits), Err(Full::Pending));
        assert_eq!(breaker.begin(&limits), Ok(()));
        assert_eq!(breaker.begin(&limits), Err(Full::Requests));
        breaker.give_up();
        assert_eq!(breaker.wait(&limits), Ok(()));
        (0..2).for_each(|_| breaker.give_up());
        breaker.end();
        breaker.close();
        assert!(breaker.is_idle());
    }

    #[test]
    fn without_limits_nothing_is_refused() {
        let mut breaker = Breaker::default();
        assert!((0..1000).all(|_| breaker.wait(&Limits::default()).is_ok()));
        assert!((0..1000).all(|_| breaker.begin(&Limits::default()).is_ok()));
    }
}
