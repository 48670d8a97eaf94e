/// Who claims one thing, in the order of the claims; nearly always one.
#[derive(Clone, Debug)]
pub(super) enum Claims<T> {
    One(T),
    /// None or several.
    Several(Vec<T>),
}

impl<T: PartialEq> Claims<T> {
    pub(super) fn iter(&self) -> std::slice::Iter<'_, T> {
        match self {
            Self::One(claim) => std::slice::from_ref(claim).iter(),
            Self::Several(claims) => claims.iter(),
        }
    }

    pub(super) fn first(&self) -> Option<&T> {
        self.iter().next()
    }

    /// Claims last; who claims already keeps its place.
    pub(super) fn add(&mut self, claim: T) {
        if self.iter().any(|other| *other == claim) {
            return;
        }
        let mut claims = std::mem::take(self).into_vec();
        claims.push(claim);
        *self = Self::from_vec(claims);
    }

    pub(super) fn remove(&mut self, claim: &T) {
        let mut claims = std::mem::take(self).into_vec();
        claims.retain(|other| other != claim);
        *self = Self::from_vec(claims);
    }

    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(claim) => vec![claim],
            Self::Several(claims) => claims,
        }
    }

    fn from_vec(mut claims: Vec<T>) -> Self {
        match claims.pop() {
            Some(only) if claims.is_empty() => Self::One(only),
            last => {
                claims.extend(last);
                Self::Several(claims)
            }
        }
    }
}

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl<T> super::shared_map::Vacant for Claims<T> {
    fn is_vacant(&self) -> bool {
        matches!(self, Self::Several(claims) if claims.is_empty())
    }
}
